"""Tools that make what the repository holds: models, and distances that are known."""
