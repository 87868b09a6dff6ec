"""Estimates of a run's memory and speed that need no GPU."""
