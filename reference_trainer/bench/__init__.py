"""Benchmarks of this library against the alternatives that a user could choose."""
