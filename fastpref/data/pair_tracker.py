"""Remarks on untokenized rows: equal prompts, repeated pairs, weights that are all zero."""

import hashlib
import json
from typing import NamedTuple

from fastpref.data.layouts.rows import Row, comparable, prompt_said
from fastpref.data.layouts.turns import WRITTEN_MESSAGES
from fastpref.data.remarks import Remark

NO_MESSAGES = "[]"
"""The prompt of a chat row without prompt messages, as JSON."""


def row_remarks(row: Row) -> Remark:
    """Remarks that depend on a single row."""
    remarks = Remark(0)
    weights = (row["chosen_weights"], row["rejected_weights"])
    if any(values and not any(values) for values in weights):
        remarks |= Remark.ZERO_WEIGHTS
    sides = (row["chosen"], row["rejected"])
    if row["form"] == "chat":
        speakers = {message["role"] for side in sides for message in json.loads(side or "[]")}
        remarks |= Remark.OTHERS_SPEAK if speakers - {"assistant"} else 0
    elif any(map(WRITTEN_MESSAGES.match, (row["prompt"], *sides))):
        remarks |= Remark.TEXT_OF_MESSAGES
    repeats = all(text.startswith(row["prompt"]) for text in sides)
    # in messages a repeated prompt is recognised, see `divide_conversations`
    if row["form"] == "text" and row["prompt"].strip() and repeats:
        remarks |= Remark.PROMPT_TWICE
    return remarks


class Noted(NamedTuple):
    """A row in relation to the earlier rows of its source."""

    group: int
    """Number of its prompt by first appearance, -1 if it has none."""
    remarks: Remark = Remark(0)
    prompt_hash: int = 0
    """Signed 64-bit hash of `prompt_said`: equal for equivalent prompts of any source."""
    pair_hash: int = 0
    """Signed 64-bit hash of prompt, chosen and rejected, as `comparable` gives them."""


class PairTracker:
    """Numbers prompts by first appearance and detects repeated pairs."""

    def __init__(self) -> None:
        self.groups: dict[bytes, int] = {}
        self.pairs: set[bytes] = set()

    def add(self, row: Row, *, paired: bool) -> Noted:
        """Record a row and return what is known of it.

        The prompt of a dropped row is numbered too, which keeps its place in the data order.
        """
        texts = comparable(row)
        if row["drop"] and texts[0] == NO_MESSAGES:
            return Noted(-1)
        # first, as it may exceed the depth of recursion
        said = _digest(prompt_said(row))
        prompt, chosen, rejected = map(_digest, texts)
        group = self.groups.setdefault(prompt, len(self.groups))
        pair = prompt + chosen + rejected
        noted = Noted(group, Remark(0), _as_integer(said), _as_integer(_digest(pair)))
        if row["drop"] or not paired:
            return noted
        if row["chosen"] == row["rejected"]:
            return noted._replace(remarks=Remark.IDENTICAL)
        remarks = Remark(0)
        if pair in self.pairs:
            remarks |= Remark.DUPLICATE
        if prompt + rejected + chosen in self.pairs and chosen != rejected:
            remarks |= Remark.CONTRADICTION
        self.pairs.add(pair)
        return noted._replace(remarks=remarks)


def _digest(text: str | bytes) -> bytes:
    encoded = text if isinstance(text, bytes) else text.encode()
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _as_integer(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
