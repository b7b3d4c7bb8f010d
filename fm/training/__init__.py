"""A run: what it starts from, its steps, what is kept of them, and the loop around them."""
