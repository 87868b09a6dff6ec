"""The properties, an assertion each."""
