"""What datasets mean: cards, canonical channels."""
