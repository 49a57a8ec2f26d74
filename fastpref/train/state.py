"""The progress of a run between two optimizer steps."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fastpref.train.guard import GuardState


@dataclass(slots=True, kw_only=True)
class RunState:
    """Progress counters: with weights, optimizer and schedule, all that the next step depends on.

    The rows of a step are a function of its number, so no state of the data is needed.
    """

    step: int = 0
    """Optimizer steps completed, including skipped ones."""
    examples: int = 0
    """Examples seen in these steps."""
    evaluated: int = -1
    """Value of `step` at the last evaluation that was completed; -1: there was none."""
    best: float | None = None
    """Best value of `checkpoint.keep_best` so far."""
    best_of: str = ""
    """The metric and the held-out rows that `best` is of."""
    best_since: int = 0
    """The first step that was evaluated on these rows, if there were others before."""
    seconds: float = 0.0
    """Wall time of earlier starts, in seconds."""
    max_tokens: int | None = None
    """Tokens that a rank computes at once, if fastpref chose them."""
    place: str = ""
    """The devices that it chose them for, see `place_of`."""
    chat_date: str = ""
    """Date of the first start, given to a chat template that prints it in all later ones."""
    guard: GuardState = field(default_factory=GuardState)
    """Counts of skipped steps."""

    def tokens_found(self, place: str) -> int | None:
        """Tokens to compute at once, if found on the same devices; else None. A resumed run then
        divides its steps as before."""
        return self.max_tokens if self.place == place else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """The inverse of `to_json`; an earlier version may lack fields that have a default.

        Raises:
            KeyError, TypeError: a required field is missing, or one is unknown or malformed.
        """
        counted = {name: values[name] for name in ("step", "examples")}
        return cls(**values | counted | {"guard": GuardState(*values["guard"])})
