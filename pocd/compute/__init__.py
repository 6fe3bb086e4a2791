"""The mathematics of the proof (docs/protocol.md). Only worker processes and `pocd compute` import torch from here."""
