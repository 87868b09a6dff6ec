"""Memory and speed of a run, estimated before there is a machine to try it on."""
