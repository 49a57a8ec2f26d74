"""Render `audit.html`."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from fastpref.data.audit.lengths import Histogram
from fastpref.data.audit.report import SplitReport
from fastpref.data.audit.shown_rows import (
    CUT,
    LOSS,
    MASKED,
    PROMPT,
    ShownPart,
    ShownRow,
    ShownToken,
)
from fastpref.page import Bar, render_bars, render_page, render_tiles, visible

MOST_TOKENS = 400
"""Most consecutive tokens of equal fate that are shown; of more, the middle is left out."""
MOST_CHARACTERS = 4000
"""Maximum characters shown of a text that was not tokenized."""

STYLE = """
:root { --loss: 13 148 136; } @media (prefers-color-scheme: dark) { :root { --loss: 45 190 170; } }
ul { margin: 0 0 .6rem; padding-left: 1.2rem; max-width: 60rem; }
.warn { border-left: 3px solid rgb(var(--high)); padding-left: .8rem; list-style: none; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; font-size: .875rem; margin: 0 0 1rem; }
.label { display: inline-block; border: 1px solid var(--line); border-radius: 1rem;
  font-size: .8rem; padding: .05rem .6rem; margin: 0 .3rem .3rem 0; }
.left { border-color: rgb(var(--high)); }
.part { margin: .7rem 0 0; } .response { line-height: 1.75; max-width: none; }
.charts { grid-template-columns: repeat(auto-fit, minmax(25rem, 1fr)); }
.response .t { border-left: 1px solid var(--line); }
.p { color: var(--muted); }
.k { background: rgb(var(--loss) / calc(var(--a, .3) * var(--strength)));
  box-shadow: inset 0 -2px rgb(var(--loss)); }
.n { background: rgb(var(--high) / calc(var(--a) * var(--strength)));
  box-shadow: inset 0 -2px rgb(var(--high)); }
.m { outline: 1px dashed var(--muted); outline-offset: -1px; }
.c { text-decoration: line-through; opacity: .55; }
.f { font-style: italic; border-bottom: 1px dotted currentColor; }
.gap { font: .8rem system-ui, sans-serif; color: var(--muted); padding: 0 .6em; }
svg .within { fill: rgb(var(--loss)); }
svg .over { fill: rgb(var(--high)); }
"""
CLASSES = {PROMPT: "p", LOSS: "k", MASKED: "m", CUT: "c"}
WORDS = {
    PROMPT: "read, not in the loss",
    LOSS: "in the loss",
    MASKED: "weight 0: not in the loss",
    CUT: "cut",
}


class AuditPage(NamedTuple):
    """Contents of the page."""

    names: Sequence[str]
    """Names of the datasets."""
    tokenizer: str
    """Name of the tokenizer."""
    facts: Sequence[str]
    warnings: Sequence[str]
    """Messages about several splits or files together."""
    splits: Sequence[SplitReport]

    def render(self) -> str:
        """The page as HTML."""
        about = f"<p class=muted>tokenizer <code>{escape(self.tokenizer)}</code></p>"
        body = about + _notes(self.facts, self.warnings) + LEGEND
        body += "".join(_split(split) for split in self.splits)
        return render_page(f"Data: {', '.join(self.names)}", body, style=STYLE)


def _sample(classes: str, text: str, meaning: str) -> str:
    return f'<span><span class="t {classes}">{text}</span> {meaning}</span>'


LEGEND = (
    "<div class=legend>"
    + _sample("p", "prompt", "read, not in the loss")
    + _sample("k", "response", "in the loss, the darker the more a token weighs")
    + _sample("n", "response", "in the loss with a negative weight")
    + _sample("m", "response", "weight 0")
    + _sample("c", "text", "cut")
    + _sample("f", "text", "of the chat template, or EOS")
    + "<span><span class=t><i class=s>&nbsp;</i> <i>↵</i> <i>⇥</i></span> space, line break, tab"
    "</span></div>"
)


def _split(report: SplitReport) -> str:
    counts = report.counts
    num_dropped = sum(counts.dropped.values())
    per_row = max(1, counts.kept)
    tiles = [
        ("rows", f"{counts.rows:,}"),
        ("left out", f"{num_dropped:,}"),
        ("rows to use", f"{counts.kept:,}"),
        ("prompts", f"{counts.prompts:,}"),
        ("prompt tokens a row", f"{counts.prompt_tokens / per_row:.0f}"),
        ("response tokens a row", f"{counts.response_tokens / per_row:.0f}"),
    ]
    charts = "".join(
        f"<figure>{histogram_svg(histogram)}<figcaption><b>{escape(histogram.name)}</b> &nbsp; "
        f"{escape(describe_lengths(histogram))}</figcaption></figure>"
        for histogram in report.lengths
    )
    return (
        f"<h2>{escape(counts.split)}</h2>{render_tiles(tiles)}<p></p>"
        f"{_notes(report.facts, report.warnings)}"
        f"<h2>{escape(counts.split)}: lengths in tokens, before anything is cut</h2>"
        f"<div class=charts>{charts}</div>"
        f"<h2>{escape(counts.split)}: rows, token by token</h2>"
        f"{''.join(map(_row, report.rows))}"
    )


def _notes(facts: Sequence[str], warnings: Sequence[str]) -> str:
    lists = (("", facts), (" class=warn", warnings))
    return "".join(
        f"<ul{kind}>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for kind, lines in lists
        if lines
    )


def describe_lengths(histogram: Histogram) -> str:
    """Caption of a histogram: its quantiles and the rows over the limit."""
    over = f"{histogram.num_over:,} of {histogram.num_rows:,}"
    return (
        f"median {histogram.median:,}, 95 % up to {histogram.most:,}, longest "
        f"{histogram.longest:,}; {over} too long for "
        f"{histogram.limit_name} = {histogram.limit:,}"
    )


def _span(low: int, high: int) -> str:
    return f"{low:,} token{'s' * (low > 1)}" if low == high else f"{low:,} to {high:,} tokens"


def histogram_svg(histogram: Histogram) -> str:
    """A histogram as inline SVG, with a line at the limit if that is within the bins."""
    highest, within = max(histogram.counts, default=0) or 1, histogram.bins_within
    bars = [
        Bar(
            "over" if within is not None and i >= within else "within",
            count / highest,
            title=f"{_span(histogram.edges[i] + 1, histogram.edges[i + 1])}: {count:,} rows",
        )
        for i, count in enumerate(histogram.counts)
    ]
    end = f"{histogram.edges[-1]:,}"
    if histogram.longest > histogram.edges[-1]:
        end += " and more"
    limit = None
    if within is not None:
        limit = (within / len(bars), f"{histogram.limit_name} = {histogram.limit:,}")
    about = f"Histogram of {histogram.name}: {describe_lengths(histogram)}"
    return render_bars(bars, about=about, ticks={0.0: "0", 1.0: end}, limit=limit)


def _row(row: ShownRow) -> str:
    labels = "".join(f"<span class=label>{escape(label)}</span>" for label in row.labels)
    if row.drop:
        labels += f'<span class="label left">{escape(row.drop)}</span>'
    remarks = f"<ul class=muted>{''.join(f'<li>{escape(r)}</li>' for r in row.remarks)}</ul>"
    return (
        f"<section class=pair>{labels}<span class='muted place'>{escape(row.place)}</span>"
        f"{remarks if row.remarks else ''}{''.join(map(_part, row.parts))}</section>"
    )


def _part(part: ShownPart) -> str:
    if not part.tokens:
        return (
            f"<div class=part><div class=side>{escape(part.name)}</div>"
            f"<p class=response>{_text(part.text)}</p></div>"
        )
    num_tokens = f"{len(part.tokens):,} tokens"
    if part.num_kept < len(part.tokens):
        num_tokens = f"{part.num_kept:,} of {num_tokens} stay"
    largest = max((abs(token.weight or 0) for token in part.tokens), default=0) or 1.0
    spans = "".join(_tokens(part.tokens, largest))
    return (
        f"<div class=part><div class=side>{escape(part.name)}, {num_tokens}</div>"
        f"<p class=response>{spans}</p></div>"
    )


def _text(text: str) -> str:
    """An untokenized text; the middle of a long one is left out."""
    half = MOST_CHARACTERS // 2
    left_out = len(text) - 2 * half
    if left_out <= 0:
        return f'<span class="t c">{visible(text)}</span>'
    gap = f"<span class=gap>… {left_out:,} characters …</span>"
    return gap.join(
        f'<span class="t c">{visible(end)}</span>' for end in (text[:half], text[-half:])
    )


def _tokens(tokens: Sequence[ShownToken], largest: float) -> Iterator[str]:
    for _, stretch in groupby(tokens, key=lambda token: token.fate):
        same = list(stretch)
        if len(same) > MOST_TOKENS:
            half = MOST_TOKENS // 2
            yield from (_token(token, largest) for token in same[:half])
            yield f"<span class=gap>… {len(same) - 2 * half:,} tokens …</span>"
            same = same[-half:]
        yield from (_token(token, largest) for token in same)


def _token(token: ShownToken, largest: float) -> str:
    kind = CLASSES[token.fate]
    about, style = f"{WORDS[token.fate]}, id {token.id}", ""
    if token.weight:
        # at least 0.1: a token of small weight still differs visibly from one of weight 0
        style = f' style="--a:{0.1 + 0.9 * abs(token.weight) / largest:.2f}"'
        kind = "n" if token.weight < 0 and token.fate == LOSS else kind
        about += f", weight {token.weight:+.4g}"
    template = " f" if token.is_template else ""
    return f'<span class="t {kind}{template}"{style} data-w="{about}">{visible(token.text)}</span>'
