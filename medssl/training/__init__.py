"""Training: the one loop, its state and its optimisation."""
