"""`LATEST/`: the trained model with all that its source has beside the weights."""
