"""Experiments over runs: sweeps of variants, and what training together does."""
