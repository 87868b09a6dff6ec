"""Products with W + s·BA that is not formed."""
