"""What all HTTP of the project shares: a server, a client, addresses that may be called, signatures, parsing."""
