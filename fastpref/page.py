"""Self-contained HTML pages: one file, no network access, light and dark colours."""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1c1917; --muted: #6b6560; --page: #fbfaf8;
  --card: #ffffff; --line: #e7e2dc; --high: 234 88 12; --low: 37 99 235; --strength: .72; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece8e3; --muted: #a49c93; --page: #161412;
  --card: #1f1c1a; --line: #35302c; --high: 249 115 22; --low: 96 145 250; --strength: .62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .8rem; }
p { margin: 0 0 .6rem; max-width: 46rem; }
.muted, dt, figcaption, .side { color: var(--muted); font-size: .875rem; }
figcaption b { color: var(--ink); font-weight: 600; }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.tiles div, .pair, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .8rem 1rem; }
dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
dl { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .75rem; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
svg .high { fill: rgb(var(--high)); } svg .low { fill: rgb(var(--low)); }
svg .axis { stroke: var(--line); } svg .mark { fill: var(--ink); }
svg .limit { stroke: var(--ink); stroke-dasharray: 4 3; }
.pair { margin: 0 0 .75rem; }
.response { font: .95rem/2 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 0;
  white-space: pre-wrap; }
.t { position: relative; padding: .2em .04em; border-radius: .22em; }
.t:hover { outline: 2px solid var(--ink); z-index: 1; }
.t:hover::after { content: attr(data-w); position: absolute; left: 0; top: 100%; margin-top: .3em;
  padding: .25em .6em; border-radius: .35em; background: var(--ink); color: var(--page);
  font: .8rem/1.4 system-ui, sans-serif; white-space: pre; pointer-events: none; z-index: 2; }
.t i, td i { font-style: normal; color: var(--muted); opacity: .75; }
.t .s, td .s { background: radial-gradient(circle, currentColor 1px, transparent 1.4px); }
details { margin-top: .5rem; } summary { cursor: pointer; }
"""
"""CSS shared by all pages."""


class Bar(NamedTuple):
    """One bar of a chart."""

    kind: str
    """CSS class of the bar."""
    height: float
    """Fraction of the chart's height, in [0, 1]."""
    title: str = ""
    """Tooltip."""
    above: str = ""
    """Label above the bar."""


def render_page(title: str, body: str, *, style: str = "") -> str:
    """An HTML page whose security policy forbids scripts and external resources.

    Args:
        title: Plain text.
        body: HTML; all text that comes from data must be escaped.
        style: CSS in addition to `STYLE`.
    """
    page = f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
<h1>{escape(title)}</h1>
{body}
</html>
"""
    # names of files may have bytes that are no UTF-8
    return page.encode(errors="backslashreplace").decode()


def render_tiles(tiles: list[tuple[str, str]]) -> str:
    """Tiles side by side, each a name and its value."""
    facts = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(value)}</dd></dl></div>"
        for name, value in tiles
    )
    return f"<div class=tiles>{facts}</div>"


def render_bars(
    bars: Sequence[Bar],
    *,
    about: str,
    ticks: Mapping[float, str],
    limit: tuple[float, str] | None = None,
) -> str:
    """A bar chart as inline SVG.

    Args:
        bars: From left to right.
        about: Description of the chart for screen readers.
        ticks: Axis labels by horizontal position, from 0 (left) to 1 (right).
        limit: Horizontal position, in [0, 1], and label of a vertical line.
    """
    width, left, top, base = 480, 8, 26, 150
    inner = width - 2 * left
    step = inner / len(bars)
    drawn = [f'<line class=axis x1="{left}" x2="{width - left}" y1="{base}" y2="{base}"/>']
    for i, bar in enumerate(bars):
        x, size = left + i * step, bar.height * (base - top)
        title = f"<title>{escape(bar.title)}</title>" if bar.title else ""
        drawn.append(
            f'<rect class={bar.kind} x="{x + 0.75:.1f}" y="{base - size:.1f}" '
            f'width="{max(step - 1.5, 0.5):.1f}" height="{size:.1f}" rx="1.5">{title}</rect>'
        )
        if bar.above:
            drawn.append(_svg_text(x + step / 2, top - 7, bar.above, anchor="middle"))
    for place, text in ticks.items():
        anchor = {0.0: "start", 1.0: "end"}.get(place, "middle")
        drawn.append(_svg_text(left + place * inner, base + 17, text, anchor=anchor))
    if limit is not None:
        x = left + limit[0] * inner
        # keep the label inside the chart
        anchor, gap = ("start", 4) if x < width / 2 else ("end", -4)
        drawn.append(
            f'<line class=limit x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{base}"/>'
            + _svg_text(x + gap, top - 10, limit[1], anchor=anchor, kind="mark")
        )
    return (
        f'<svg viewBox="0 0 {width} {base + 24}" role=img aria-label="{escape(about)}">'
        f"{''.join(drawn)}</svg>"
    )


def _svg_text(x: float, y: float, text: str, *, anchor: str, kind: str = "") -> str:
    kind = f" class={kind}" if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y}" text-anchor={anchor}>{escape(text)}</text>'


def visible(text: str) -> str:
    """A text as HTML with every character visible: dots for spaces, signs for line breaks and tabs,
    code points for other invisible characters. ▫ is a token without text of its own, which holds
    only some of a character's bytes."""
    return "".join(map(_visible, text)) if text else "<i>▫</i>"


def _visible(character: str) -> str:
    if character == " ":
        return "<i class=s> </i>"
    if character == "\n":
        return "<i>↵</i>\n"
    if character == "\t":
        return "<i>⇥</i>\t"
    # control and format characters (which may reverse a line), separators, lone surrogates
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs"):
        return f"<i>U+{ord(character):04X}</i>"
    return escape(character)
