"""Why a rollout diverges: instruments for one model on one dataset, and a page of what they show."""
