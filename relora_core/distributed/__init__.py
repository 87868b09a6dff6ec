"""Processes: parts of tensors, DTensors, FSDP2 and consensus."""
