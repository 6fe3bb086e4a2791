"""What a power cut leaves of the store, at any moment of its work: the images are made, opened and judged."""
