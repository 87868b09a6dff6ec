"""Records, progress and the terminal."""
