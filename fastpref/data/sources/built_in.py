"""The built-in datasets, one entry of `SOURCES` each."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from fastpref.data.sources.hub import HUB_SETS, hub_rows


class BuiltIn(NamedTuple):
    """A dataset that needs no local folder.

    The cache key of its rows covers only the code of `data`: any other input must be constant.
    """

    origin: str
    """Name for messages: its hub id, or its own name if embedded."""
    rows: Callable[[str, str | None], Iterator[dict[str, Any]]]
    """(split, cache_dir) -> preference rows of the split; both train and test exist. A field
    `sft_target` replaces the SFT target, by default the last chosen response of a prompt.
    """


def _planted(split: str, cache_dir: str | None) -> Iterator[dict[str, Any]]:
    from fastpref.data.sources.planted import generate_rows

    return iter(generate_rows(split))


SOURCES: dict[str, BuiltIn] = {
    "planted": BuiltIn("planted", _planted),
    **{name: BuiltIn(path, partial(hub_rows, name)) for name, (path, _) in HUB_SETS.items()},
}
"""Built-in datasets by their names in the option `datasets`."""
