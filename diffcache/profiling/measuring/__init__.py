"""Measure recorded runs: the tables that a profile holds."""
