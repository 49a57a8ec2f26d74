"""Option values that both the config and the functions that take them validate."""

TIES = ("seed", "equal")
"""How the transforms `binary` and `rank_based` treat equal values, see `transform_weights`."""
