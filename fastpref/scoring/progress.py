"""Progress of scoring one model."""

import logging
import time

from fastpref.progress import Progress

logger = logging.getLogger("fastpref")

LOG_SECONDS = 10.0
"""Seconds between progress log lines where there is no terminal for a progress bar."""


class ScoringProgress:
    """Tokens scored, tokens/s and time left: a progress bar on a terminal, else log lines."""

    def __init__(self, label: str, num_tokens: int, *, num_shards: int = 0, visible: bool) -> None:
        self._num_shards = num_shards
        self._num_done = 0
        self._label = label
        self._total = num_tokens
        self._tokens = 0
        self._visible = visible
        self._started = self._told = time.perf_counter()
        self._bar = Progress(total=self._total, visible=visible, label=f"{self._label}, tokens")

    def __enter__(self) -> "ScoringProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    @property
    def done(self) -> str:
        """Shards written since this start, in words: "3 of 8 shards of the positive model"."""
        return f"{self._num_done} of {self._num_shards} shards of the {self._label}"

    def advance(self, tokens: int) -> None:
        """Count tokens that were just scored: prompt and response of every sequence."""
        self._tokens += tokens
        now = time.perf_counter()
        rate = self._tokens / (now - self._started)
        self._bar.advance(tokens, f"{rate:,.0f} tokens/s")
        if self._visible and not self._bar.on_terminal and now - self._told > LOG_SECONDS:
            self._told = now
            logger.info(
                "%s: %d %% of %s tokens, %s tokens/s, %.0f s left",
                self._label,
                100 * self._tokens // self._total,
                f"{self._total:,}",
                f"{rate:,.0f}",
                (self._total - self._tokens) / rate,
            )

    def shard_is_done(self) -> None:
        """Count a shard that was just written."""
        self._num_done += 1
