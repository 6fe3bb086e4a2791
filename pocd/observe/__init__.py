"""Observation: logs, events, rates, and notices to the service manager."""
