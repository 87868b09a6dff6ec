"""Checkpoints: found, loaded and written."""
