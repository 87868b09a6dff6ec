"""The arms of ReLoRA's paper, trained side by side at sizes that a CPU can train."""
