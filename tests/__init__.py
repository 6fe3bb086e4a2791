"""A folder for each room of pocd, and support, reference and system beside them."""
