"""Prediction from file to file, and its scores."""
