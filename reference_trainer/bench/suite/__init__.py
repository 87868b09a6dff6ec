"""The GPU suite: nine stages of measurements in separate processes, compared with the roofline."""
