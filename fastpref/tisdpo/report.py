"""What `weights.html` and `weights.png` show of a file of estimated token weights."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.batch import EncodedRow
from fastpref.data.audit.token_texts import token_texts
from fastpref.data.weights_file import WeightsOrigin
from fastpref.tisdpo.planted_tokens import planted_mask, roc_auc

NUM_EXAMPLES = 12
LONGEST_EXAMPLE = 160
"""Tokens of the longer response of a pair that is shown."""

NUM_BINS = 41
"""Of a histogram; odd, so that one lies around 0."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedToken:
    """A response token as the report shows it."""

    text: str
    weight: float
    """After the sign step: +log(π⁺/π⁻) in a chosen response, -log(π⁺/π⁻) in a rejected one."""
    raw: float
    """As the file has it, log π⁻ - log π⁺, in nats."""
    is_planted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A pair to show."""

    prompt: str
    chosen: list[WeighedToken]
    rejected: list[WeighedToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReport:
    """All that the two pictures need."""

    title: str
    """Dataset and split."""
    positive: str
    negative: str
    num_rows: int
    chosen: Array
    """Weights after the sign step of all chosen tokens, in nats. (tokens,)"""
    rejected: Array
    examples: list[Example] = field(default_factory=list)
    auc: float | None = None
    """How well a rejected token's weight singles out the planted ones; None without any."""

    @property
    def limit(self) -> float:
        """Where the colour scale ends, in nats: the 90th percentile of |weight|, to one digit."""
        return self._percentile(90)

    @property
    def span(self) -> float:
        """Where the histograms end, in nats: the 99th percentile."""
        return self._percentile(99)

    def _percentile(self, percent: float) -> float:
        both = np.abs(np.concatenate([self.chosen, self.rejected]))
        percentile = float(np.percentile(both, percent)) if len(both) else 0.0
        return float(f"{percentile:.1g}") or 1.0


def histogram(weights: Array, span: float) -> tuple[Array, Array, float]:
    """Share of a side's tokens by weight; what lies beyond the span is in the outer bins.

    Most tokens of a pair decide nothing, so the bin around 0 may dwarf all others: the scale then
    ends above the second one.

    Returns:
        Edges (bins + 1,), shares (bins,), and where the scale of shares ends.
    """
    edges = np.linspace(-span, span, NUM_BINS + 1)
    counts, _ = np.histogram(weights.clip(-span, span), edges)
    shares = counts / max(1, counts.sum())
    second, first = np.sort(shares)[-2:]
    return edges, shares, 1.3 * float(second) if first > 2 * second > 0 else float(first) or 1.0


def read_report(
    path: Path, encoded: Sequence[EncodedRow], origin: WeightsOrigin, tokenizer: Any
) -> WeightsReport:
    """Read a weights file for its report.

    Args:
        path: The file, `{name}/{split}.jsonl`.
        encoded: Its rows' ids, with EOS where the file has a weight for it.
        origin: Where the weights come from.
        tokenizer: Of both models.
    """
    # without offsets it is not known which tokens hold a planted character
    has_planted = origin.source == "planted" and tokenizer.is_fast
    chosen, rejected, wrong, examples = [], [], [], []
    shown = pick_examples(encoded)
    for i, record in enumerate(read_lines(path)):
        raw = [np.array(record[f"{side}_weight"], np.float64) for side in ("chosen", "rejected")]
        is_wrong = np.zeros(len(raw[1]), np.bool_)
        if has_planted:
            # EOS, where it has a weight, is never planted
            ids = list(encoded[i].rejected_ids)[: -1 if origin.includes_eos else None]
            texts = (record["prompt"], record["rejected"])
            is_wrong[: len(ids)] = planted_mask(*texts, ids, tokenizer)
        if i in shown:
            examples.append(build_example(encoded[i], raw, is_wrong, tokenizer))
        of_chosen, of_rejected = learned_tokens(encoded[i])
        chosen.append(-raw[0][of_chosen])
        rejected.append(raw[1][of_rejected])
        wrong.append(is_wrong[of_rejected])
    rejected_weights = np.concatenate(rejected)
    return WeightsReport(
        title=f"{path.parent.name}, {path.stem}",
        positive=describe_side(origin.positive.name_or_path, origin.positive.template),
        negative=describe_side(origin.negative.name_or_path, origin.negative.template),
        num_rows=origin.rows,
        chosen=np.concatenate(chosen),
        rejected=rejected_weights,
        examples=examples,
        auc=roc_auc(rejected_weights, np.concatenate(wrong)) if has_planted else None,
    )


def learned_tokens(row: EncodedRow) -> list[NDArray[np.bool_] | slice]:
    """Which tokens of chosen and rejected are in the loss."""
    return [
        slice(None) if marks is None else np.array(marks, np.bool_)
        for marks in (row.chosen_scored, row.rejected_scored)
    ]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a weights file, one at a time."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def pick_examples(encoded: Sequence[EncodedRow]) -> set[int]:
    """Places of pairs short enough to read, spread over the file."""
    short = [
        i
        for i, row in enumerate(encoded)
        if max(len(row.chosen_ids), len(row.rejected_ids)) <= LONGEST_EXAMPLE
    ]
    # where all are long the first ones must do
    places = short or list(range(len(encoded)))
    steps = np.linspace(0, len(places) - 1, min(NUM_EXAMPLES, len(places)))
    return {places[int(step)] for step in steps}


def build_example(
    row: EncodedRow, raw: Sequence[Array], is_planted: NDArray[np.bool_], tokenizer: Any
) -> Example:
    """A pair's tokens with their weights; long responses are cut."""
    sides = []
    for ids, values, sign in ((row.chosen_ids, raw[0], -1), (row.rejected_ids, raw[1], 1)):
        planted = is_planted if sign > 0 else np.zeros(len(values), np.bool_)
        pieces = token_texts(list(ids)[:LONGEST_EXAMPLE], tokenizer)
        sides.append(
            [
                WeighedToken(text=text, weight=sign * value, raw=value, is_planted=bool(wrong))
                for text, value, wrong in zip(pieces, values.tolist(), planted, strict=False)
            ]
        )
    prompt = tokenizer.decode(row.prompt_ids)
    return Example(prompt=prompt, chosen=sides[0], rejected=sides[1])


def describe_side(name: str, template: str) -> str:
    """A model in a few words: the end of its path, and the template if there is one."""
    short = "/".join(Path(name).parts[-2:])
    return f"{short} under “{template}”" if template else short
