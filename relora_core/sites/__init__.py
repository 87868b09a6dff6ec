"""The low-rank sites of a model."""
