"""A trained model, measured."""
