"""Work with a trained model: export it, extend it by a dataset, and roll it out from file to file."""
