"""Which round is mined, by whom it was decided, and the spans of nonces that are lent to workers."""
