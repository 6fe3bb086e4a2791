"""The daemon as a whole: makes its parts, runs and stops them in order, reloads its configuration."""
