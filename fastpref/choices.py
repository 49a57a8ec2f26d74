"""Words that options and functions share; a word outside them is refused by both."""

TIES = ("seed", "equal")
"""What the transforms `binary` and `rank_based` do with equal values, see `transform_weights`."""
