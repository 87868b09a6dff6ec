"""One low-rank site: its parametrization, made and unmade."""
