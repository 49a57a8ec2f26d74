"""What is remarkable about rows as texts: equal prompts, pairs that come again, idle weights."""

import hashlib

from fastpref.data.counts import Remark
from fastpref.data.rows import MALFORMED, Row, comparable

NO_MESSAGES = "[]"
"""The prompt of a row of messages that has none."""


def row_remarks(row: Row) -> Remark:
    """What is remarkable about a row by itself."""
    remarks = Remark(0)
    weights = (row["chosen_weights"], row["rejected_weights"])
    if any(values and not any(values) for values in weights):
        remarks |= Remark.ZERO_WEIGHTS
    repeats = all(text.startswith(row["prompt"]) for text in (row["chosen"], row["rejected"]))
    # of messages this is recognised, see `divide_conversations`
    if row["form"] == "text" and row["prompt"].strip() and repeats:
        remarks |= Remark.PROMPT_TWICE
    return remarks


class PairTracker:
    """Numbers prompts by first appearance and notices pairs that come again."""

    def __init__(self) -> None:
        self.groups: dict[bytes, int] = {}
        self.pairs: set[bytes] = set()

    def add(self, row: Row, *, paired: bool) -> tuple[int, Remark]:
        """The row's prompt number (-1 if it has none) and what is remarkable about its pair.

        The prompt of a row to drop has a number too: it keeps its place in the order of the data.
        """
        texts = comparable(row)
        if row["drop"] == MALFORMED or (row["drop"] and texts[0] == NO_MESSAGES):
            return -1, Remark(0)
        prompt, chosen, rejected = map(_digest, texts)
        group = self.groups.setdefault(prompt, len(self.groups))
        if row["drop"] or not paired:
            return group, Remark(0)
        if row["chosen"] == row["rejected"]:
            return group, Remark.IDENTICAL
        remarks = Remark(0)
        if prompt + chosen + rejected in self.pairs:
            remarks |= Remark.DUPLICATE
        if prompt + rejected + chosen in self.pairs and chosen != rejected:
            remarks |= Remark.CONTRADICTION
        self.pairs.add(prompt + chosen + rejected)
        return group, remarks


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
