"""Training: the stages and the data they read."""
