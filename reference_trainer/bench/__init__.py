"""Measures what a user would pick instead, against it, in one run."""
