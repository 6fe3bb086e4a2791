"""What people and machines watch: logs, metrics, the service manager."""
