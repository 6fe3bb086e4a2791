"""Mining: who decides which round is mined, and the spans of nonces that are leased to workers."""
