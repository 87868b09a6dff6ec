"""The commands of the benchmarks, one per module."""
