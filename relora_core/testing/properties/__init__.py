"""The properties, with one assertion for each."""
