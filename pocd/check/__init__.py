"""`pocd check`: find what keeps this host from mining and delivering."""
