"""A run's records as a picture and as a page."""
