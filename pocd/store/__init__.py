"""All SQL of the daemon: its one SQLite file, written by one thread and kept small."""
