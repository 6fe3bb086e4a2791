"""From a stored batch to a receiver's 2xx: when a batch is formed, posted, tried again, or given up."""
