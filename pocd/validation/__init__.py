"""Whether a batch of somebody else's is honest: the claim, the verdict, and the queue of those that wait."""
