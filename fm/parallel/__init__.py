"""How the training objective, its gradients and its optimiser are spread over processes."""
