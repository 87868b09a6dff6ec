"""The paper's comparison at sizes that suit a CPU, run with the trainer's own loop."""
