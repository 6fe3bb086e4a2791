"""`pocd receiver`: the reference receiver of proofs, a program of its own."""
