"""The process that owns a device, and the messages between it and the daemon."""
