"""Export to `LATEST/`: the trained weights with all other files of the source model."""
