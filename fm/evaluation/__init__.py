"""Evaluation: rollouts, their errors, scores under a named protocol, tables, pictures and the report page."""
