"""Experiments over runs: plans, benchmarks, sweeps, few-shot learning, transfer, diagnosis, status and replay."""
