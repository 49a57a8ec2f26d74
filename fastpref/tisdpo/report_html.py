"""`weights.html`: the report as a self-contained page, readable without colours."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastpref.complete_files import complete_file
from fastpref.page import Bar, render_bars, render_page, render_tiles, visible
from fastpref.tisdpo.report import Example, WeighedToken, WeightsReport, histogram

STYLE = """
.scale { display: flex; align-items: center; gap: .7rem; font-size: .875rem; margin: 1rem 0 0;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.scale i { flex: 0 1 13rem; height: .8rem; border-radius: .4rem; background: linear-gradient(90deg,
  rgb(var(--low) / var(--strength)), transparent, rgb(var(--high) / var(--strength)));
  border: 1px solid var(--line); }
svg .none { fill: var(--muted); opacity: .55; }
.prompt { white-space: pre-wrap; margin: 0 0 .6rem; color: var(--muted); max-width: none; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  gap: .4rem 2rem; }
.h { background: rgb(var(--high) / calc(var(--a) * var(--strength))); }
.l { background: rgb(var(--low) / calc(var(--a) * var(--strength))); }
.x { text-decoration: underline 2px; text-underline-offset: .28em; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
td, th { padding: .1rem .9rem .1rem 0; text-align: right; font-weight: 400;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: pre-wrap; }
th { color: var(--muted); }
"""
"""CSS in addition to `page.STYLE`."""


def write_html(report: WeightsReport, path: Path) -> None:
    """Write the report as an HTML page."""
    with complete_file(path) as file:
        file.write(render_html(report))


def render_html(report: WeightsReport) -> str:
    """The report as an HTML page."""
    tiles = [
        ("pairs", f"{report.num_rows:,}"),
        ("response tokens", f"{len(report.chosen) + len(report.rejected):,}"),
        ("mean weight, chosen", f"{report.chosen.mean():+.3f}"),
        ("mean weight, rejected", f"{report.rejected.mean():+.3f}"),
    ]
    if report.auc is not None:
        tiles.append(("ROC-AUC, planted", f"{report.auc:.3f}"))
    underlined = (
        "<p class=muted>Underlined: the wrong tokens that were planted in the rejected response. "
        "The ROC-AUC says how well a rejected token's weight singles them out.</p>"
        if report.auc is not None
        else ""
    )
    charts = "".join(
        f"<figure>{histogram_svg(values, report.span, side)}"
        f"<figcaption><b>{side}</b> &nbsp; mean {values.mean():+.2f}, deviation "
        f"{values.std():.2f}, "
        f"{(values > 0).mean():.0%} above 0</figcaption></figure>"
        for side, values in (("chosen", report.chosen), ("rejected", report.rejected))
    )
    pairs = "".join(render_pair(example, report.limit) for example in report.examples)
    body = f"""<p class=muted>π⁺ <code>{escape(report.positive)}</code> &nbsp; π⁻
<code>{escape(report.negative)}</code></p>
<p>The weight of a token is log(π⁺/π⁻) where the response was chosen and its negative where it was
rejected, in nats: high where a token decides the preference.</p>
{render_tiles(tiles)}
<div class=scale aria-hidden=true><span>&minus;{report.limit:g}</span><i></i><span>{report.limit:+g}
nats</span></div>
<h2>How weights are spread</h2>
<div class=charts>{charts}</div>
<h2>Pairs, token by token</h2>
{underlined}
{pairs}"""
    return render_page(f"Token weights: {report.title}", body, style=STYLE)


def histogram_svg(values: NDArray[np.float64], span: float, side: str) -> str:
    """Histogram of one side's weights as inline SVG; a bar that is cut off is labelled with its
    share."""
    _, shares, highest = histogram(values, span)
    middle = len(shares) // 2
    bars = [
        Bar(
            "high" if i > middle else "low" if i < middle else "none",
            min(1.0, share / highest),
            above=f"{share:.0%}" if share > highest else "",
        )
        for i, share in enumerate(shares)
    ]
    above = float((values > 0).mean())
    return render_bars(
        bars,
        about=f"Histogram of the weights of {side} tokens: {above:.0%} lie above zero",
        ticks={0.0: f"\N{MINUS SIGN}{span:g} and less", 0.5: "0", 1.0: f"+{span:g} and more"},
    )


def render_pair(example: Example, limit: float) -> str:
    """A pair as HTML: prompt, both responses coloured by weight, and a table of the weights."""
    sides = "".join(
        f"<div><div class=side>{side}</div>"
        f"<p class=response>{render_tokens(tokens, limit)}</p></div>"
        for side, tokens in (("chosen", example.chosen), ("rejected", example.rejected))
    )
    rows = "".join(
        f"<tr><td>{visible(token.text)}</td><td>{side}</td><td>{token.weight:+.3f}</td>"
        f"<td>{token.raw:+.3f}</td></tr>"
        for side, tokens in (("chosen", example.chosen), ("rejected", example.rejected))
        for token in tokens
    )
    return (
        f"<section class=pair><p class=prompt>{escape(example.prompt)}</p>"
        f"<div class=sides>{sides}</div>"
        "<details><summary class=muted>numbers</summary><table><tr><th>token</th><th>response</th>"
        f"<th>weight</th><th>in the file</th></tr>{rows}</table></details></section>"
    )


def render_tokens(tokens: Sequence[WeighedToken], limit: float) -> str:
    """A response as spans coloured by weight, which show their values on hover."""
    spans = []
    for token in tokens:
        strength = min(1.0, abs(token.weight) / limit)
        classes = f"t {'h' if token.weight > 0 else 'l'}{' x' if token.is_planted else ''}"
        spans.append(
            f'<span class="{classes}" style="--a:{strength:.2f}" data-w="weight '
            f'{token.weight:+.3f}   in the file {token.raw:+.3f}">{visible(token.text)}</span>'
        )
    return "".join(spans)
