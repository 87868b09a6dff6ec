"""A bank of experts, read in each way that a model may."""
