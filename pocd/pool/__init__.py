"""The daemon's side of the workers: starts, feeds, watches and restarts their processes. No torch."""
