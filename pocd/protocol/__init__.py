"""The protocol as data and arithmetic: rounds, nonces, proofs, schemes and their theory (docs/protocol.md)."""
