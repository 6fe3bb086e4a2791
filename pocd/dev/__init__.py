"""Development tools: a development chain, the demo, and starting the project's own processes."""
