"""What a run has written down, as a picture and as a page."""
