"""The Llama."""
