"""What is proved, as words and numbers: rounds, nonces, proofs, schemes and their theory (docs/protocol.md)."""
