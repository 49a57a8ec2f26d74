"""Value checks shared by the config dataclasses, and formatting of their messages."""

import dataclasses
import difflib
import math
import operator
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

TIES = ("seed", "equal")
"""How the transforms `binary` and `rank_based` treat equal values, see `transform_weights`: checked
both in the config and in the function."""

_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_number(
    key: str,
    value: float | None,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> None:
    """Refuse a number that is NaN, infinite or outside its bounds; None (not set) passes.

    Args:
        key: Name of the option, for the message.
        value: Value to check.
        gt, ge, lt, le: Bounds: value > gt, >= ge, < lt, <= le.

    Raises:
        ValueError: "loss.beta must be > 0, got -1.0".
    """
    if value is None:
        return
    bounds = {">": gt, ">=": ge, "<": lt, "<=": le}
    rules = {sign: bound for sign, bound in bounds.items() if bound is not None}
    # a whole number may be too large for a float, which isfinite converts to
    is_finite = isinstance(value, int) or math.isfinite(value)
    if is_finite and all(_COMPARE[sign](value, rules[sign]) for sign in rules):
        return
    words = [f"{sign} {_exact(bound)}" for sign, bound in rules.items()]
    # say "finite" if that is the rule broken: inf does satisfy > 0
    words += [] if rules and is_finite else ["finite"]
    rule = " and ".join(words)
    raise ValueError(f"{key} must be {rule}, got {value}")


def _exact(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value outside `choices`; the message lists them and the nearest one.

    Raises:
        ValueError: "task must be one of train, audit, got 'trian'; nearest: train".
    """
    if value not in choices:
        raise ValueError(
            f"{key} must be one of {', '.join(choices)}, got {value!r}{hint(value, choices)}"
        )


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that starts with `name` or is most similar, ignoring case; None if none is."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    longer = [lower for lower in by_lower if len(name) > 2 and lower.startswith(name.lower())]
    close = longer or difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def expand_home(options: Any, *names: str) -> None:
    """Expand a leading ~ in path options, in place; hub ids never start with one.

    Args:
        options: A config dataclass.
        names: Fields that hold a path, a list of paths, or None.
    """
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        elif value is not None:
            setattr(options, name, [os.path.expanduser(path) for path in value])


def check_not_empty(options: Any, group: str = "") -> None:
    """Refuse empty texts, as of an unset variable of a shell, in options and their groups.

    Args:
        options: A config dataclass.
        group: Prefix of its options, "model.".

    Raises:
        ValueError: "run_dir must be a non-empty text or null, got ''".
    """
    for field in dataclasses.fields(options):
        value, key = getattr(options, field.name), group + field.name
        if dataclasses.is_dataclass(value):
            check_not_empty(value, f"{key}.")
        elif field.default != "" and (value == "" or (isinstance(value, list) and "" in value)):
            rule = "a list of non-empty texts" if isinstance(value, list) else "a non-empty text"
            or_null = " or null" if field.default is None else ""
            raise ValueError(f"{key} must be {rule}{or_null}, got {value!r}")


def take_other_name(options: Any, name: str, other: str, *, group: str = "") -> None:
    """Move the value of an alias (`other`) to the option it stands for (`name`).

    Raises:
        ValueError: both are given and differ.
    """
    value, given = getattr(options, name), getattr(options, other)
    if given is None:
        return
    if value not in (None, given):
        raise ValueError(
            f"{group}{other} is another name of {group}{name}: give one of them, "
            f"got {given!r} and {value!r}"
        )
    setattr(options, name, given)
    setattr(options, other, None)


def listed(names: Sequence[str]) -> str:
    """Join names with commas: the first eight, and the total number if there are more."""
    more = f", … ({len(names)} in all)" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def both_ends(text: str) -> str:
    """Shorten a text over 160 characters to 80 characters of each end, for the log."""
    return text if len(text) <= 160 else f"{text[:80]} … {text[-80:]}"


def share_of(part: int, whole: int) -> str:
    """Format as "3 of 1,200 (0.25 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.3g} %)"


def hint(name: str, candidates: Iterable[str]) -> str:
    """Suffix "; nearest: X" for a message, or "" if no candidate is close."""
    close = nearest(name, candidates)
    return f"; nearest: {close}" if close else ""


def as_count(name: str, value: str) -> int | None:
    """Parse an integer option that may be "auto"; None for auto.

    Raises:
        ValueError: the value is neither.
    """
    if value == "auto":
        return None
    # str(): code may pass an int
    if not re.fullmatch("-?[0-9]+", str(value)):
        raise ValueError(f"{name} must be auto or a whole number >= 1, got {value!r}")
    return int(value)


def as_number(name: str, value: str) -> float | None:
    """Parse a number option that may be "auto"; None for auto.

    Raises:
        ValueError: the value is neither.
    """
    if value == "auto":
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be auto or a number, got {value!r}") from None
