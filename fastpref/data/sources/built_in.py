"""The data sets that have a name here: each is one entry of `SOURCES`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from fastpref.data.sources.hub import HUB_PATHS, hub_rows


class BuiltIn(NamedTuple):
    """A data set that needs no folder."""

    origin: str
    """What messages call it: where it comes from."""
    rows: Callable[[str, str | None], Iterator[dict[str, Any]]]
    """(split, cache_dir) -> preference rows; `sft_target` beside them says what to imitate."""


def _planted(split: str, cache_dir: str | None) -> Iterator[dict[str, Any]]:
    from fastpref.data.sources.planted import generate_rows

    return iter(generate_rows(split))


SOURCES: dict[str, BuiltIn] = {
    "planted": BuiltIn("planted", _planted),
    **{name: BuiltIn(path, partial(hub_rows, name)) for name, path in HUB_PATHS.items()},
}
"""By the name that the option `datasets` takes."""
