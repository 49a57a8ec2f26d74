"""The report on a file of estimated token weights, shown as `weights.html` and `weights.png`."""

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
"""Largest length of a shown response, in tokens."""

NUM_BINS = 41
"""Bins of a histogram; an odd number, so that one is centred on 0."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedToken:
    """A response token with its weight."""

    text: str
    weight: float
    """+log(π⁺/π⁻) in a chosen response, -log(π⁺/π⁻) in a rejected one, in nats."""
    raw: float
    """Value in the file, log π⁻ - log π⁺, in nats."""
    is_planted: bool
    """Whether it is one of the wrong tokens of the dataset `planted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A pair that the report shows token by token."""

    prompt: str
    chosen: list[WeighedToken]
    rejected: list[WeighedToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReport:
    """Everything that `weights.html` and `weights.png` show."""

    title: str
    """Dataset and split."""
    positive: str
    negative: str
    num_rows: int
    chosen: Array
    """Weights of all chosen tokens that are in the loss, see `WeighedToken.weight`. (tokens,)"""
    rejected: Array
    examples: list[Example] = field(default_factory=list)
    auc: float | None = None
    """ROC-AUC of a rejected token's weight as a score for planted ones; None if none are known."""

    @property
    def limit(self) -> float:
        """End of the colour scale, nats: 90th percentile of |weight|, to one significant digit."""
        return self._percentile(90)

    @property
    def span(self) -> float:
        """End of the histograms, nats: 99th percentile of |weight|, to one significant digit."""
        return self._percentile(99)

    def _percentile(self, percent: float) -> float:
        both = np.abs(np.concatenate([self.chosen, self.rejected]))
        percentile = float(np.percentile(both, percent)) if len(both) else 0.0
        return float(f"{percentile:.1g}") or 1.0


def histogram(weights: Array, span: float) -> tuple[Array, Array, float]:
    """Histogram of one side's token weights; weights beyond the span go into the outer bins.

    Most tokens of a pair decide nothing, so the bin around 0 may dwarf all others: the vertical
    scale then ends just above the second-highest bin.

    Returns:
        Bin edges (bins + 1,), shares of tokens (bins,), and the end of the vertical scale.
    """
    edges = np.linspace(-span, span, NUM_BINS + 1)
    counts, _ = np.histogram(weights.clip(-span, span), edges)
    shares = counts / max(1, counts.sum())
    second, first = np.sort(shares)[-2:]
    return edges, shares, 1.3 * float(second) if first > 2 * second > 0 else float(first) or 1.0


def read_report(
    path: Path, encoded: Sequence[EncodedRow], origin: WeightsOrigin, tokenizer: Any
) -> WeightsReport:
    """Build the report on a weights file.

    Args:
        path: The file, `{name}/{split}.jsonl`.
        encoded: Token ids of its rows, with EOS if the file has a weight for it.
        origin: The contents of the file's sidecar.
        tokenizer: The tokenizer of both models.
    """
    # only a fast tokenizer gives the offsets that locate planted characters
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
    """Masks, or whole slices, of the chosen and the rejected tokens that are in the loss."""
    return [
        slice(None) if marks is None else np.array(marks, np.bool_)
        for marks in (row.chosen_scored, row.rejected_scored)
    ]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a weights file, one at a time."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def pick_examples(encoded: Sequence[EncodedRow]) -> set[int]:
    """Indices of pairs to show: short enough to read, and spread over the file."""
    short = [
        i
        for i, row in enumerate(encoded)
        if max(len(row.chosen_ids), len(row.rejected_ids)) <= LONGEST_EXAMPLE
    ]
    # if all pairs are long, any will do: `build_example` cuts them
    places = short or list(range(len(encoded)))
    steps = np.linspace(0, len(places) - 1, min(NUM_EXAMPLES, len(places)))
    return {places[int(step)] for step in steps}


def build_example(
    row: EncodedRow, raw: Sequence[Array], is_planted: NDArray[np.bool_], tokenizer: Any
) -> Example:
    """A pair's tokens with their weights; long responses are truncated."""
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
    """A model in a few words: the last two parts of its path, and its template if it has one."""
    short = "/".join(Path(name).parts[-2:])
    return f"{short} under “{template}”" if template else short
