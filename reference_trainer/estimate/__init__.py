"""What a run would need and how fast it would be, before there is a machine to try it on."""
