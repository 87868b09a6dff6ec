"""A small FSDP2 trainer that proves `relora_core` on real models."""
