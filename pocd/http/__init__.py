"""HTTP shared by all programs of the project: server, client, allowed addresses, signatures, parsing."""
