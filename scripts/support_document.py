"""docs/support-matrix.md: what was found out about every family, as a table."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers

SCORE_BOUND = 1e-4
"""Nats between our score of a token and that of plain transformers in float64."""
LOSS_BOUND = 1e-6


class Entry(NamedTuple):
    """What became of one family."""

    family: str
    """Its model type."""
    outcome: str
    """trains, differs, refused, or not built."""
    model_class: str = ""
    layout: str = ""
    """How its rows lie: packed with shared prompts, packed, padded."""
    attention: str = ""
    asks: str = ""
    """Of attention, beside causality."""
    adapters: str = ""
    score_error: float = math.nan
    loss_error: float = math.nan
    export_error: float = math.nan
    remark: str = ""
    wrapper: str = ""
    """What it has beside text: not trained, and the same in the export."""


def format_document(entries: Sequence[Entry]) -> str:
    """The matrix as Markdown."""
    trained = [entry for entry in entries if entry.outcome == "trains"]
    packed = [entry for entry in trained if entry.layout.startswith("packed")]
    adapted = [entry for entry in trained if entry.adapters == "yes"]
    wrappers = [entry for entry in trained if entry.wrapper]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    made = f"""
Written by `python scripts/support_matrix.py`: a tiny random model of every family of {versions}
with a language model, float32, on a CPU. Of {len(entries)} families {len(trained)} train,
{len(packed)} of them on packed rows, {len(adapted)} with adapters; {len(wrappers)} of them are
wrappers, whose column names what they have beside text: it is not loaded, and the export has it
bit by bit as its source does. To train means: every response token scored as plain transformers
scores it in float64 (within {SCORE_BOUND:g} nats), a wrapper by its own class with all that it has;
a first DPO loss of ln 2 (within {LOSS_BOUND:g}), a finite gradient, and an export with the names of
its source's tensors that plain transformers loads and scores as the trained policy does; the same
scores are asked of adapters. Asked for is what the attention of
packed rows computed, in windows shorter than the rows where a family has them by default."""
    lines = [
        "# Which model families train here",
        "",
        textwrap.fill(" ".join(made.split()), 120, break_on_hyphens=False),
        "",
        "| family | class | wrapper | rows | attention | asks for | adapters | scores off, nats "
        "| loss off | export off, nats | why |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e.family} | {e.model_class} | {e.wrapper} | {e.layout} | {e.attention} | {e.asks} "
        f"| {_cell(e.adapters)} | {e.score_error:.0e} | {e.loss_error:.0e} "
        f"| {e.export_error:.0e} | {_cell(e.remark)} |"
        for e in trained
    ]
    for outcome, title in (
        ("refused", "Refused, and what a user reads"),
        ("differs", "Let through, and not right"),
        ("not built", "Not tried: transformers builds no tiny random model of them"),
    ):
        found = [entry for entry in entries if entry.outcome == outcome]
        if found:
            lines += ["", f"## {title}", "", "| family | |", "|---|---|"]
            lines += [f"| {entry.family} | {_cell(_said_of(entry))} |" for entry in found]
    return "\n".join(lines) + "\n"


def _said_of(entry: Entry) -> str:
    if entry.remark and math.isnan(entry.score_error):
        return entry.remark
    return (
        f"scores off by {entry.score_error:.1e} nats, loss by {entry.loss_error:.1e}, export by "
        f"{entry.export_error:.1e} nats; {entry.layout}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
