"""What a user would pick instead: other one-step surrogates, trained and scored by the same code."""
