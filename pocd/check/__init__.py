"""`pocd check`: what keeps this host from mining and delivering."""
