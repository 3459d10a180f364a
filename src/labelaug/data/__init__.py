"""Data: synthetic tasks, image sets, planted features."""
