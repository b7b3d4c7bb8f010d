"""How fast this machine trains, dataset by dataset, and what stops it from being faster."""
