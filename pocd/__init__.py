"""pocd: a Proof-of-Compute daemon."""

__version__ = "0.1.0"
