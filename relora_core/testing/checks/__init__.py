"""The checks: all properties of a subject in turn."""
