"""The laboratory: `pocd compute`, `calibrate` and `audit`, and the statistics behind them."""
