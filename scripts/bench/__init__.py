"""Benches: how fast the engine, the API, deliveries, mining and the daemon are."""
