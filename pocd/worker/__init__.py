"""The GPU worker: a child process, and the coroutine that keeps it alive."""
