"""Pictures of runs whose test looks at none."""

from collections.abc import Callable
from typing import Any


def leave_pictures_blank(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Files are written as ever, with nothing drawn: drawing is a quarter of a small run."""
    # not before the tests have said how many threads numpy has
    from matplotlib.figure import Figure

    replace(Figure, "draw", lambda *_: None)
