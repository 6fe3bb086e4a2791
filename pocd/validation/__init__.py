"""Validation of other miners' batches: the claim, the verdict, and the queue of pending ones."""
