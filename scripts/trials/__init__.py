"""Trials that take minutes or hours: distributions, runs from end to end, and crashes."""
