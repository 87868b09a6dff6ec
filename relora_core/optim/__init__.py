"""The reset of an optimizer's state."""
