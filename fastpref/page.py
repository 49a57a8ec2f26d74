"""A page of its own: one HTML file that asks no network for anything, light and dark."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1917; --muted: #6b6560; --page: #fbfaf8;
  --card: #ffffff; --line: #e7e2dc; --high: 234 88 12; --low: 37 99 235; --strength: .72; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece8e3; --muted: #a49c93; --page: #161412;
  --card: #1f1c1a; --line: #35302c; --high: 249 115 22; --low: 96 145 250; --strength: .62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
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
svg .axis { stroke: var(--line); }
.pair { margin: 0 0 .75rem; }
.response { font: .95rem/2 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.t { position: relative; padding: .2em .04em; border-radius: .22em; }
.t:hover { outline: 2px solid var(--ink); z-index: 1; }
.t:hover::after { content: attr(data-w); position: absolute; left: 0; top: 100%; margin-top: .3em;
  padding: .25em .6em; border-radius: .35em; background: var(--ink); color: var(--page);
  font: .8rem/1.4 system-ui, sans-serif; white-space: pre; pointer-events: none; z-index: 2; }
details { margin-top: .5rem; } summary { cursor: pointer; }
"""
"""What pages of this project have in common."""


def render_page(title: str, body: str, *, style: str = "") -> str:
    """A page that may load nothing and run nothing, whatever its body holds.

    Args:
        title: As plain text.
        body: HTML, everything that comes from data escaped in it.
        style: CSS beside `STYLE`.
    """
    return f"""<!doctype html>
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


def render_tiles(tiles: list[tuple[str, str]]) -> str:
    """Numbers with their names, side by side."""
    facts = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(value)}</dd></dl></div>"
        for name, value in tiles
    )
    return f"<div class=tiles>{facts}</div>"
