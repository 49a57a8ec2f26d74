"""The data sets that have a name here: each is one entry of `SOURCES`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from fastpref.data.sources.hub import HUB_SETS, hub_rows


class BuiltIn(NamedTuple):
    """A data set that needs no folder.

    The cache of its rows is found by the code of this room: what else they are read from must not
    change.
    """

    origin: str
    """What messages call it: where it comes from."""
    rows: Callable[[str, str | None], Iterator[dict[str, Any]]]
    """(split, cache_dir) -> preference rows of the split, train or test: it has both. What to
    imitate where that is not the last chosen response of a prompt, `sft_target` beside them says.
    """


def _planted(split: str, cache_dir: str | None) -> Iterator[dict[str, Any]]:
    from fastpref.data.sources.planted import generate_rows

    return iter(generate_rows(split))


SOURCES: dict[str, BuiltIn] = {
    "planted": BuiltIn("planted", _planted),
    **{name: BuiltIn(path, partial(hub_rows, name)) for name, (path, _) in HUB_SETS.items()},
}
"""By the name that the option `datasets` takes."""
