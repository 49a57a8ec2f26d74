"""`weights.png`: the histograms and a few pairs, for a README or a notebook."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.weights_report import Example, WeighedToken, WeightsReport

COLUMNS = 100
"""Characters across the figure."""
GLYPH = 0.602
"""Width of a character of DejaVu Sans Mono, em."""
LINE = 1.55
"""Height of a text line, in font sizes."""
MAX_LINES = 3
"""Of one response."""
NUM_PAIRS = 6
INK, MUTED, HIGH, LOW = "#1c1917", "#78716c", "#ea580c", "#2563eb"


def plot_weights(report: WeightsReport, path: Path) -> None:
    """Two histograms above, pairs coloured token by token below.

    Args:
        report: What to show.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for example in report.examples[:NUM_PAIRS] for line in pair_lines(example)]
    width = 10.0
    font_size = (width - 0.8) * 72 / COLUMNS / GLYPH
    text_height = len(lines) * font_size * LINE / 72
    height = 2.75 + text_height
    figure = plt.figure(figsize=(width, height), facecolor="white")
    top = 1 - 0.75 / height
    for i, (side, values) in enumerate((("chosen", report.chosen), ("rejected", report.rejected))):
        axes = figure.add_axes((0.04 + 0.48 * i, top - 1.2 / height, 0.44, 1.2 / height))
        draw_histogram(axes, values, report.limit, side)
    title = f"Token weights: {report.title}"
    if report.auc is not None:
        title += f"   (planted tokens: ROC-AUC {report.auc:.3f})"
    figure.text(0.04, 1 - 0.33 / height, title, size=13, weight="bold", color=INK, va="center")
    axes = figure.add_axes((0.04, 0.18 / height, 0.92, text_height / height))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    for row, (label, tokens) in enumerate(lines):
        draw_line(axes, row, label, tokens, font_size, report.limit)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_histogram(axes: Any, values: np.ndarray, limit: float, side: str) -> None:
    """Share of tokens by weight, in the colours of the tokens below."""
    counts, edges = np.histogram(values.clip(-limit, limit), np.linspace(-limit, limit, 42))
    centres = (edges[:-1] + edges[1:]) / 2
    colors = [blend(centre, limit) for centre in centres]
    shares = 100 * counts / max(1, counts.sum())
    axes.bar(centres, shares, np.diff(edges) * 0.86, color=colors, edgecolor="#d6d3d1", lw=0.4)
    axes.set_title(f"{side}: weight in nats, % of tokens", size=9, color=MUTED, loc="left")
    axes.axvline(0, color=MUTED, lw=0.7, ls=(0, (2, 3)))
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)
    axes.spines["bottom"].set_color("#d6d3d1")


def pair_lines(example: Example) -> list[tuple[str, list[WeighedToken] | str]]:
    """A pair as lines of text: prompt, chosen, rejected, a blank one."""
    prompt = textwrap.shorten(example.prompt.replace("\n", " "), COLUMNS - 2, placeholder=" …")
    lines: list[tuple[str, list[WeighedToken] | str]] = [("", prompt)]
    for label, tokens in (("chosen", example.chosen), ("rejected", example.rejected)):
        for i, line in enumerate(wrap_tokens(tokens)):
            lines.append(("" if i else label, line))
    return [*lines, ("", "")]


def wrap_tokens(tokens: Sequence[WeighedToken]) -> list[list[WeighedToken]]:
    """Tokens in lines that fit beside the label; what does not fit in `MAX_LINES` is left out."""
    lines: list[list[WeighedToken]] = [[]]
    used = 0
    for token in tokens:
        size = len(drawn(token.text))
        if used + size > COLUMNS - 11 and lines[-1]:
            if len(lines) == MAX_LINES:
                break
            lines.append([])
            used = 0
        lines[-1].append(token)
        used += size
    return lines


def draw_line(axes: Any, row: int, label: str, tokens: Any, font_size: float, limit: float) -> None:
    """One line: plain text, or a label and tokens on coloured ground."""
    from matplotlib.patches import Rectangle

    font = {"size": font_size, "family": "DejaVu Sans Mono", "va": "center"}
    if isinstance(tokens, str):
        axes.text(0, row + 0.5, tokens, color=MUTED, parse_math=False, **font)
        return
    axes.text(1, row + 0.5, label, color=MUTED, parse_math=False, **font)
    x = 11
    for token in tokens:
        text = drawn(token.text)
        color = blend(token.weight, limit)
        axes.add_patch(Rectangle((x + 0.04, row + 0.06), len(text) - 0.08, 0.88, color=color, lw=0))
        axes.text(x, row + 0.5, text, color=INK, parse_math=False, **font)
        if token.is_planted:
            ends = (x + 0.2, x + len(text) - 0.2)
            axes.plot(ends, (row + 0.9, row + 0.9), color=INK, lw=1.4)
        x += len(text)


def drawn(text: str) -> str:
    """A token's text on one line."""
    return text.replace("\n", "↵").replace("\t", " ") or "·"


def blend(weight: float, limit: float) -> tuple[float, ...]:
    """White at 0, towards one colour above and another below."""
    from matplotlib.colors import to_rgb

    strength = 0.75 * min(1.0, abs(weight) / limit)
    color = to_rgb(HIGH if weight > 0 else LOW)
    return tuple(1 - strength * (1 - channel) for channel in color)
