"""The API that the live network's orchestrators call: pocd as the proof engine of a node (docs/live.md)."""
