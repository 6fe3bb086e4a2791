"""The admin HTTP API: calls, status, metrics, events, and the status page."""
