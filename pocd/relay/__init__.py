"""`pocd relay`: a durable hop between a proof server of the live network and its orchestrator."""
