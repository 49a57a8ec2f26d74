"""Where a run stands between two optimizer steps."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fastpref.train.guard import GuardState


@dataclass(slots=True, kw_only=True)
class RunState:
    """What a run counts: with weights, optimizer and schedule, all that its next step depends on.

    The rows of a step are a function of its number, so nothing is kept of the data.
    """

    step: int = 0
    """Optimizer steps done, those left out included."""
    examples: int = 0
    """Seen in them."""
    evaluated: int = -1
    """Steps done before the last evaluation that came to its end; -1: there was none."""
    best: float | None = None
    """Best value of `checkpoint.keep_best` so far."""
    best_of: str = ""
    """Which metric that is, and of which rows."""
    seconds: float = 0.0
    """Wall time of the starts before this one."""
    max_tokens: int | None = None
    """Tokens that a process computes at once, where that was found out."""
    place: str = ""
    """Where it was found out."""
    chat_date: str = ""
    """The day of the first start, which a chat template that prints the date is told ever since."""
    guard: GuardState = field(default_factory=GuardState)
    """Steps left out."""

    def tokens_found(self, place: str) -> int | None:
        """Tokens to compute at once, if that was found out in this place: a run that goes on there
        divides its steps as before."""
        return self.max_tokens if self.place == place else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"guard": list(self.guard)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """What `to_json` gave; of an earlier version fields may be missing that have a default.

        Raises:
            KeyError, TypeError: there are fields of a later version, or not what a run counts.
        """
        counted = {name: values[name] for name in ("step", "examples")}
        return cls(**values | counted | {"guard": GuardState(*values["guard"])})
