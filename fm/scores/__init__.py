"""Scores: a named protocol, one file of errors, and the tables made of them. No torch."""
