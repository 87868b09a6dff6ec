"""Ranks, spectra and summaries."""
