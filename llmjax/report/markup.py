"""HTML parts of a report: escaped text, formatted numbers, tables, cards, and the style sheet."""

from collections.abc import Iterable, Sequence
import html
import math
import re
from typing import Any

_UNITS = ((1e4, 1e3, "k"), (1e6, 1e6, "M"), (1e9, 1e9, "G"), (1e12, 1e12, "T"))  # (minimum, divisor, unit)
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def escape(text: Any) -> str:
    """Text that is safe in HTML, SVG and attributes; characters that are invalid there become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(text)))


def format_number(value: float | None) -> str:
    """A number in at most four significant digits: 0.000291, 3.412, 1,834, 12.3 k, 4.57 M; None is an em dash."""
    if value is None:
        return "\u2014"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= _UNITS[0][0]:
        return format_axis([value])[0]
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_axis(values: Sequence[float]) -> list[str]:
    """Finite numbers, all in the unit of the largest: 0, 5 k, 10 k."""
    largest = max(map(abs, values), default=0.0)
    for minimum, divisor, unit in reversed(_UNITS):
        if largest >= minimum:
            return [f"{value / divisor:.3g}\u202f{unit}" if value else "0" for value in values]
    return [format_number(value) for value in values]


def format_count(value: int | float | None) -> str:
    """A number rounded to an integer with all digits: 1,234,567; None is an em dash."""
    return format_number(None) if value is None else f"{value:,.0f}"


def _escape_cell(value: Any) -> str:
    is_count = value is None or (isinstance(value, int) and not isinstance(value, bool))
    return escape(format_count(value) if is_count else value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, texts: int = 1) -> str:
    """A table whose first `texts` columns are text; the others are right-aligned numbers. Integers are formatted."""

    def render_row(cells: Sequence[Any], tag: str) -> str:
        attributes = [""] * texts + [' class="number"'] * (len(cells) - texts)
        items = (f"<{tag}{a}>{_escape_cell(cell)}</{tag}>" for a, cell in zip(attributes, cells, strict=True))
        return f"<tr>{''.join(items)}</tr>"

    body = "".join(render_row(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{render_row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def definition_list(rows: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values; rows with the value None or "" are omitted. Integers are formatted."""
    shown = ((name, value) for name, value in rows if value not in (None, ""))
    items = (f"<div><dt>{escape(name)}</dt><dd>{_escape_cell(value)}</dd></div>" for name, value in shown)
    return f"<dl>{''.join(items)}</dl>"


def section(title: str, body: str, *, note: str = "") -> str:
    """A section of the page with a title; `note` is small text under the title."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{below}{body}</section>"


def missing_part(text: str, command: str) -> str:
    """A line about a missing part of the report, with the command that writes it."""
    return f'<p class="missing">{escape(text)} To get it, run <code>{escape(command)}</code>.</p>'


def facts_and_chart(facts: Iterable[tuple[str, str]], title: str, chart: str) -> str:
    """(value, description) pairs beside a chart, for the top of a page."""
    items = "".join(
        f'<div class="fact"><div class="big">{escape(value)}</div><div class="what">{escape(description)}</div></div>'
        for value, description in facts
    )
    return f'<div class="hero"><div class="facts">{items}</div><div><h3>{escape(title)}</h3>{chart}</div></div>'


def chart_grid(charts: Iterable[tuple[str, str]]) -> str:
    """(title, SVG) pairs in two columns."""
    cells = "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts)
    return f'<div class="plots">{cells}</div>'


def collapsed(summary: str, body: str) -> str:
    """A part that opens on a click; the words of the summary before a colon are highlighted."""
    first, colon, rest = summary.partition(": ")
    return f"<details><summary><b>{escape(first)}</b>{colon}{escape(rest)}</summary>{body}</details>"


def excerpt(html_text: str, caption: str = "") -> str:
    """A block of preformatted text, already escaped, with a caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><pre>{html_text}</pre>{below}</figure>"


def html_page(title: str, body: str) -> str:
    """The complete document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root { --paper: #faf9f7; --card: #ffffff; --ink: #1f2328; --soft: #656d76; --rule: #e4e2dd; --grid: #efede9;
  --accent: #0f6e6e; --accent-faint: #9cc9c6; --other: #c9c6bf; --dots: #b4570c;
  --restart: #7a5ea8; --skipped: #c0392b;
  --run0: #0f6e6e; --run1: #c2571a; --run2: #5b53b5; --run3: #b8336a;
  --run4: #3d7a1f; --run5: #1f6fb5; --run6: #8a6d0f; --run7: #6b6f76; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1c1f23; --ink: #e6e4df; --soft: #9a9fa6;
  --rule: #2e3238; --grid: #272b30; --accent: #5cc4bd; --accent-faint: #2f6663; --other: #4a4f57; --dots: #e8a25c;
  --restart: #b39ddb; --skipped: #ef7f73;
  --run0: #5cc4bd; --run1: #f0985a; --run2: #a99cf0; --run3: #ee84ae;
  --run4: #8fcf6c; --run5: #75b5ee; --run6: #d9bd55; --run7: #b3b8c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.02em; margin: 0; font-weight: 650; }
h2 { font-size: 17px; margin: 0 0 14px; font-weight: 620; letter-spacing: -0.01em; }
h3 { font-size: 13px; margin: 0 0 6px; font-weight: 560; color: var(--soft); }
header p { margin: 6px 0 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
section > h2 + .note { margin: -10px 0 14px; }
.note, .legend, .missing { color: var(--soft); font-size: 13px; }
.missing { margin: 4px 0; }
.hero { display: grid; grid-template-columns: minmax(220px, 5fr) 7fr; gap: 20px 40px; align-items: center; }
.facts { display: grid; gap: 14px; }
.fact .big { font-size: 34px; line-height: 1.1; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.fact:first-child .big { color: var(--accent); }
.fact .what { color: var(--soft); font-size: 13px; }
.plots { margin-top: 26px; display: grid; grid-template-columns: 1fr 1fr; gap: 22px 28px; }
.plots > div { min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible;
  font-family: inherit; font-variant-numeric: tabular-nums; }
svg .tick { font-size: 11.5px; fill: var(--soft); }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--rule); }
.run0 { --run: var(--run0); } .run1 { --run: var(--run1); } .run2 { --run: var(--run2); } .run3 { --run: var(--run3); }
.run4 { --run: var(--run4); } .run5 { --run: var(--run5); } .run6 { --run: var(--run6); } .run7 { --run: var(--run7); }
svg .line { fill: none; stroke: var(--run, var(--accent)); stroke-width: 1.8; stroke-linejoin: round; }
svg .faint { fill: none; stroke: var(--accent-faint); stroke-width: 1; stroke-linejoin: round; }
svg .dot { fill: var(--run, var(--accent)); } svg .dot.faint { fill: var(--accent-faint); stroke: none; }
svg .dot.dots { fill: var(--dots); stroke: var(--card); stroke-width: 1.2; }
svg .mark { stroke-width: 1.2; stroke-dasharray: 4 3; } svg .mark.restart { stroke: var(--restart); }
svg .mark.skipped { stroke: var(--skipped); } svg .nonfinite { fill: var(--skipped); }
svg .bar { fill: var(--other); } svg .total { fill: var(--rule); } svg .bar.accent { fill: var(--accent); }
svg .name, svg .value { font-size: 13px; fill: var(--ink); } svg .name.accent, svg .value.accent { font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }
.legend [class^=run] i { background: var(--run); }
.legend .line i { background: var(--accent); } .legend .faint i { background: var(--accent-faint); }
.legend .dots i { background: var(--dots); width: 8px; height: 8px; border-radius: 50%; }
.legend .restart i { background: var(--restart); } .legend .skipped i { background: var(--skipped); }
.wide { overflow-x: auto; }
.wrap td { vertical-align: top; }
.wrap td:not(.number):not(:first-child) { white-space: normal; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 560; color: var(--soft); font-size: 12.5px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; padding: 6px 0 6px 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 0 36px; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 20px;
  padding: 5px 0; border-bottom: 1px solid var(--grid); }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dl + h3, .wide + h3, dl + .wide, .wide + .wide, details + .wide { margin-top: 20px; }
.wide + details, .wide + .missing { margin-top: 14px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 13px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; line-height: 1.45; }
figure { margin: 0; padding: 14px 16px; background: var(--paper); border-radius: 8px; }
figure + figure { margin-top: 12px; }
figcaption { color: var(--soft); font-size: 12.5px; margin-top: 8px; }
mark { background: none; color: var(--accent); font-weight: 650; }
.part { margin-top: 18px; } .part + details { margin-top: 4px; }
.narrow { max-width: 520px; }
details + details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); }
details > pre { margin-top: 10px; } details > figure, details > .wide { margin-top: 10px; }
summary b { font-weight: 560; color: var(--ink); } summary { padding: 3px 0; }
.assumptions { margin: 14px 0 0; padding-left: 18px; }
.advice { margin: 0; padding: 0; list-style: none; }
.advice li { padding: 7px 0 7px 14px; border-left: 3px solid var(--dots); overflow-wrap: anywhere; }
.advice li + li { margin-top: 8px; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 26px; }
@media (max-width: 760px) { .hero, .plots { grid-template-columns: 1fr; } main { padding: 28px 12px 48px; }
  section { padding: 18px 14px; } dl { grid-template-columns: 1fr; } dt { white-space: normal; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
