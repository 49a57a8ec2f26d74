"""What small runs do again and again, done once in a process or left out: a third of their time."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from fastpref.memory import planning
from fastpref.memory.count import TokenBytes
from fastpref.tisdpo import run_jobs
from fastpref.train.logs import report

Replace = Callable[[Any, str, Any], None]

_compose_choices, _count_token_bytes = train.compose_choices, planning.count_token_bytes
_counted: dict[Any, TokenBytes] = {}


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


@functools.cache
def _composed(choices: tuple[str, ...]) -> Any:
    return _compose_choices(list(choices))
