"""The configuration: its keys, their types, and the secrets that it names."""
