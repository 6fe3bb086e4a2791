"""The mathematics: from nonces through the model to distances. Needs torch."""
