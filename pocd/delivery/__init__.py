"""From a stored proof to a receiver's 2xx."""
