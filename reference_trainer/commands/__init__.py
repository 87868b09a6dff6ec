"""The commands that make, prepare and export runs; others lie with what they run."""
