"""What small runs do again and again, done once in a process or left out: a third of their time."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from fastpref.data import source
from fastpref.errors import DataError
from fastpref.memory import planning
from fastpref.memory.count import TokenBytes
from fastpref.tisdpo import run_jobs
from fastpref.train.logs import report

Replace = Callable[[Any, str, Any], None]

_compose_choices, _count_token_bytes = train.compose_choices, planning.count_token_bytes
_load_rows = source.load_rows
_counted: dict[Any, TokenBytes] = {}
_read: dict[Any, source.Rows] = {}


def leave_pictures_blank(replace: Replace = setattr) -> None:
    """Files are written as ever, with nothing drawn."""

    def leave_blank(_: Any, path: Path) -> None:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")

    replace(report, "plot_curves", leave_blank)
    replace(run_jobs, "plot_weights", leave_blank)


def count_once(replace: Replace = setattr) -> None:
    """The same choices are composed once, and what a token takes is counted once a model."""

    def compose(choices: list[str]) -> Any:
        return copy.deepcopy(_composed(tuple(choices)))

    def count(model: Any, **options: Any) -> TokenBytes:
        parameters = ((n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters())
        key = (repr(model), repr(model.config), tuple(parameters), tuple(options.items()))
        if key not in _counted:
            _counted[key] = _count_token_bytes(model, **options)
        return _counted[key]

    replace(train, "compose_choices", compose)
    replace(planning, "count_token_bytes", count)


def read_once(replace: Replace = setattr) -> None:
    """Files that are as they were are read once, four times being what a run does."""

    def load(part: Any, options: Any, *, earlier: set[int] | None, quiet: bool) -> source.Rows:
        try:
            key = repr((part, options)), part.location.state(options.cache_dir)
        except DataError:
            key = None
        # what follows from other files as well
        if key is None or earlier is not None or options.read.weighted:
            return _load_rows(part, options, earlier=earlier, quiet=quiet)
        if key not in _read:
            _read[key] = _load_rows(part, options, earlier=None, quiet=quiet)
        return _read[key]

    replace(source, "load_rows", load)


def taken() -> list[Callable[[], None]]:
    """The shortcuts of this process, for one that is forked off."""
    counts, reads = planning.count_token_bytes, source.load_rows
    return [count_once] * (counts is not _count_token_bytes) + [read_once] * (
        reads is not _load_rows
    )


@functools.cache
def _composed(choices: tuple[str, ...]) -> Any:
    return _compose_choices(list(choices))
