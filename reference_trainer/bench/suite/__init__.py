"""The GPU suite: nine stages of measurements, each a process of its own, beside the roofline."""
