"""The benchmarks, a command each."""
