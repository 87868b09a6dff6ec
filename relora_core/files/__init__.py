"""Files of weights and of adapters."""
