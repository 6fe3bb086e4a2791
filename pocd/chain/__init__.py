"""Sources of blocks: what the chain says, checked."""
