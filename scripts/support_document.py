"""Formats docs/support-matrix.md: the results of every model family, as a table."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers

SCORE_BOUND = 1e-4
"""Bound in nats of a token's log-probability against plain transformers in float64."""
LOSS_BOUND = 1e-6
"""Bound of the first DPO loss against ln 2, in nats."""


class Entry(NamedTuple):
    """Result of one family."""

    family: str
    """Model type in transformers."""
    outcome: str
    """trains, differs, refused, or not built."""
    model_class: str = ""
    layout: str = ""
    """Layout of its rows: packed with shared prompts, packed, or padded."""
    attention: str = ""
    asks: tuple[str, ...] = ()
    """Features that it needs from attention beside causality: window, sinks, softcap."""
    recurrent: str = ""
    """Layers other than attention that mix tokens, and are run sequence by sequence."""
    adapters: str = ""
    score_error: float = math.nan
    """Largest error of a log-probability before training, in nats."""
    loss_error: float = math.nan
    export_error: float = math.nan
    """Largest error of a log-probability of the exported model, in nats."""
    remark: str = ""
    wrapper: str = ""
    """Parts of a multimodal model beside text; not trained, and unchanged in the export."""


def format_document(entries: Sequence[Entry]) -> str:
    """The matrix as Markdown."""
    trained = [entry for entry in entries if entry.outcome == "trains"]
    packed = [entry for entry in trained if entry.layout.startswith("packed")]
    shared = [entry for entry in packed if entry.layout.endswith("shared")]
    windows = [entry for entry in packed if "window" in entry.asks]
    recurrent = [entry for entry in packed if entry.recurrent]
    adapted = [entry for entry in trained if entry.adapters == "yes"]
    wrappers = [entry for entry in trained if entry.wrapper]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    made = f"""
Written by `python scripts/support_matrix.py`: a tiny random model of every family of {versions}
with a language model, float32, on a CPU. Of {len(entries)} families {len(trained)} train,
{len(packed)} of them on packed rows ({len(shared)} with shared prompts, {len(windows)} with windows
shorter than the rows, {len(recurrent)} with recurrent layers or convolutions, which go through a
row sequence by sequence), {len(adapted)} with adapters; {len(wrappers)} of them are
wrappers, whose column names what they have beside text: it is not loaded, and the export has it
bit by bit as its source does. To train means: every response token scored as plain transformers
scores it in float64 (within {SCORE_BOUND:g} nats), a wrapper by its own class with all that it has;
a first DPO loss of ln 2 (within {LOSS_BOUND:g}), a finite gradient, and an export with the names of
its source's tensors that plain transformers loads and scores as the trained policy does; the same
scores are asked of adapters. Windows, sinks and softcaps are what the attention of packed rows
was asked for; a family that has windows by default has shorter ones than the rows here."""
    lines = [
        "# Which model families train here",
        "",
        textwrap.fill(" ".join(made.split()), 120, break_on_hyphens=False),
        "",
        "| family | class | packs | shares | window | sinks | softcap | recurrent | adapters "
        "| wrapper | attention | scores off, nats | loss off | export off, nats | why |",
        f"|{'---|' * 15}",
    ]
    lines += [
        f"| {e.family} | {e.model_class} | {_yes(e in packed)} | {_yes(e in shared)} "
        f"| {' | '.join(_yes(name in e.asks) for name in ('window', 'sinks', 'softcap'))} "
        f"| {e.recurrent} | {_cell(e.adapters)} | {e.wrapper} | {e.attention} "
        f"| {e.score_error:.0e} | {e.loss_error:.0e} "
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


def _yes(holds: bool) -> str:
    return "yes" if holds else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
