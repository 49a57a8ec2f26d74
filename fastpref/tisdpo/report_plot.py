"""`weights.png`: histograms and a few pairs as a picture, for a README or a notebook."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.complete_files import complete_file
from fastpref.tisdpo.report import Example, WeighedToken, WeightsReport, histogram

COLUMNS = 104
"""Width of the text area, in characters."""
GAP = 4
"""Width of the gap between two columns of pairs, in characters."""
LABEL = 10
"""Width of the labels `chosen` and `rejected`, in characters."""
FONT = "DejaVu Sans Mono"
"""Comes with matplotlib."""
GLYPH = 0.602
"""Width of a character of the font, in em."""
LINE = 1.6
"""Height of a text line, in em."""
MAX_LINES = 3
"""Most lines of one response."""
WIDTH, MARGIN, HEADER = 10.0, 0.4, 2.3
"""Width of the figure, its margin, and height of everything above the pairs, in inches."""
INK, MUTED, RULE, HIGH, LOW = "#1c1917", "#78716c", "#d6d3d1", "#ea580c", "#2563eb"

Line = tuple[str, str | list[WeighedToken]]
"""A label, and plain text or tokens."""


def plot_weights(report: WeightsReport, path: Path) -> None:
    """Write the picture: two histograms above, pairs coloured token by token below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blocks = lay_out(report.examples)
    num_lines = max(len(column) for column in blocks)
    font_size = (WIDTH - 2 * MARGIN) * 72 / COLUMNS / GLYPH
    text_height = num_lines * font_size * LINE / 72
    height = HEADER + text_height + 0.15
    figure = plt.figure(figsize=(WIDTH, height), facecolor="white")

    def inches(
        left: float, top: float, width: float, tall: float
    ) -> tuple[float, float, float, float]:
        return left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height

    top = 1 - 0.36 / height
    title = figure.text(MARGIN / WIDTH, top, f"Token weights: {printable(report.title)}")
    title.set(size=13, weight="bold", color=INK, parse_math=False)
    if report.auc is not None:
        figure.text(
            1 - MARGIN / WIDTH,
            top,
            f"underlined: planted wrong tokens, ROC-AUC {report.auc:.3f}",
            size=9,
            color=MUTED,
            ha="right",
        )
    half = (WIDTH - 2 * MARGIN - 0.4) / 2
    for i, (side, values) in enumerate((("chosen", report.chosen), ("rejected", report.rejected))):
        axes = figure.add_axes(inches(MARGIN + i * (half + 0.4), 0.85, half, 0.95))
        draw_histogram(axes, values, report, side)
    axes = figure.add_axes(inches(MARGIN, HEADER, WIDTH - 2 * MARGIN, text_height))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(num_lines, 0)
    axes.axis("off")
    for i, column in enumerate(blocks):
        for row, line in enumerate(column):
            draw_line(axes, i * (COLUMNS + GAP) / 2, row, line, font_size, report.limit)
    with complete_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def draw_histogram(
    axes: Any, values: NDArray[np.float64], report: WeightsReport, side: str
) -> None:
    """Draw the histogram of one side's weights, in the colours of the tokens below."""
    edges, shares, highest = histogram(values, report.span)
    centres = (edges[:-1] + edges[1:]) / 2
    colors = [blend(centre, report.limit) for centre in centres]
    axes.bar(centres, 100 * shares, np.diff(edges) * 0.86, color=colors, edgecolor=RULE, lw=0.5)
    axes.set_ylim(0, 100 * highest)
    axes.set_title(f"{side}: % of tokens by weight in nats", size=9, color=MUTED, loc="left")
    for centre, share in zip(centres, shares, strict=True):
        if share > highest:
            text = f" {share:.0%}"
            axes.text(centre + np.diff(edges)[0] / 2, 100 * highest, text, size=8, color=MUTED)
            axes.texts[-1].set_va("top")
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def lay_out(examples: Sequence[Example]) -> list[list[Line]]:
    """The lines of the shown pairs in two columns, or in one if responses are long."""
    longest = max((used(side) for e in examples for side in (e.chosen, e.rejected)), default=0)
    half = (COLUMNS - GAP) // 2
    num_columns = 2 if longest <= 2 * (half - LABEL) else 1
    width = half if num_columns == 2 else COLUMNS
    shown = [pair_lines(example, width) for example in examples[: 4 * num_columns]]
    return [[line for pair in shown[i::num_columns] for line in pair] for i in range(num_columns)]


def used(tokens: Sequence[WeighedToken]) -> int:
    """Width of a response on one line, in characters."""
    return sum(len(drawn(token.text)) for token in tokens)


def pair_lines(example: Example, width: int) -> list[Line]:
    """A pair as lines of at most `width` characters: prompt, chosen, rejected, a blank line."""
    lines: list[Line] = [("", shorten(printable(" ".join(example.prompt.split())), width))]
    for label, tokens in (("chosen", example.chosen), ("rejected", example.rejected)):
        for i, line in enumerate(wrap_tokens(tokens, width - LABEL)):
            lines.append(("" if i else label, line))
    return [*lines, ("", "")]


def wrap_tokens(tokens: Sequence[WeighedToken], width: int) -> list[list[WeighedToken]]:
    """Tokens in at most `MAX_LINES` lines of `width` characters; the rest is left out."""
    lines: list[list[WeighedToken]] = [[]]
    for token in tokens:
        if lines[-1] and used([*lines[-1], token]) > width:
            if len(lines) == MAX_LINES:
                break
            lines.append([])
        lines[-1].append(token)
    return lines


def draw_line(axes: Any, x: float, row: int, line: Line, font_size: float, limit: float) -> None:
    """Draw one line: plain text, or a label and tokens on coloured backgrounds."""
    from matplotlib.patches import Rectangle

    label, content = line
    # parse_math off: dollar signs are text, not maths
    font = {"size": font_size, "family": FONT, "va": "center", "parse_math": False}
    if isinstance(content, str):
        axes.text(x, row + 0.5, content, color=MUTED, **font)
        return
    axes.text(x, row + 0.5, label, color=MUTED, **font)
    x += LABEL
    for token in content:
        text = drawn(token.text)
        color = blend(token.weight, limit)
        axes.add_patch(Rectangle((x + 0.04, row + 0.08), len(text) - 0.08, 0.8, color=color, lw=0))
        axes.text(x, row + 0.48, text, color=INK, **font)
        if token.is_planted:
            ends = (x + 0.15, x + len(text) - 0.15)
            axes.plot(ends, (row + 0.93, row + 0.93), color=INK, lw=1.5, solid_capstyle="butt")
        x += len(text)


def drawn(text: str) -> str:
    """A token's text on one line, at most as wide as the line of a column."""
    text = text.replace("\n", "↵").replace("\t", " ")
    return shorten(printable(text), (COLUMNS - GAP) // 2 - LABEL) or "·"


def shorten(text: str, width: int) -> str:
    """A text cut to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def printable(text: str) -> str:
    """A text with a box for each character that the font lacks or that would not be seen."""
    return "".join(
        character
        if ord(character) in glyphs() and unicodedata.category(character) not in ("Cc", "Cf")
        else "□"
        for character in text
    )


@cache
def glyphs() -> frozenset[int]:
    """Code points that the font has. Of others matplotlib warns one by one, and draws a box of
    another width."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def blend(weight: float, limit: float) -> tuple[float, ...]:
    """RGB colour of a weight: white at 0, towards `HIGH` above and `LOW` below it."""
    from matplotlib.colors import to_rgb

    strength = 0.75 * min(1.0, abs(weight) / limit)
    color = to_rgb(HIGH if weight > 0 else LOW)
    return tuple(1 - strength * (1 - channel) for channel in color)
