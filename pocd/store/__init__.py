"""All SQL of the daemon: its one file, opened, written by one thread, and kept small."""
