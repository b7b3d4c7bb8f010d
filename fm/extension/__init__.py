"""A trained model of more datasets: what it knew stays the same, bit for bit."""
