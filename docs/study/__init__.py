"""The paper's comparison at sizes for a CPU, by the trainer's own loop."""
