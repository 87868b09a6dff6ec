"""The commands `train`, `prepare` and `export`; the others are in packages of their own."""
