"""Workers from a Ray cluster: the bridge between it and a daemon, and the actor of each worker."""
