"""The page: tables, pictures and colours in one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from uoe_jax.escape import escape_line
from uoe_jax.report.style import data_uri
from uoe_jax.report.svg import STYLE

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2128; --soft: #57606a;
  --line: #d0d7de; --card: #f6f8fa; --accent: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --ink: #e6edf3;
  --soft: #9aa5b1; --line: #363d47; --card: #1f262e; --accent: #4FA8E0; } }
body { background: var(--paper); color: var(--ink); margin: 0 auto; max-width: 1180px;
  padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line);
  padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1rem 0 .2rem; }
p { margin: .3rem 0 .8rem; max-width: 75ch; } p.soft { color: var(--soft); }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace;
  font-size: .82rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
.overlays { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(31rem, 100%), 1fr)); }
ul.alarms { list-style: none; margin: .4rem 0 1rem; padding: .5rem .9rem;
  border-left: 4px solid #d1242f; background: var(--card); border-radius: 4px; }
th.sorts { cursor: pointer; } th.sorts:hover, th[aria-sort] { color: var(--accent); }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
figure { margin: 0; overflow-x: auto; }
figcaption { color: var(--soft); font-size: .85rem; }
pre.tokens { background: var(--card); padding: .6rem; margin: .2rem 0; overflow-x: auto;
  line-height: 1.35; border-radius: 4px; }
.keys { margin: .2rem 0; font-size: .85rem; } .key { margin-right: .9rem;
  white-space: nowrap; } .key i { display: inline-block; width: .9em; height: .9em;
  margin-right: .3em; vertical-align: -.1em; border-radius: 2px; opacity: .75; }
"""

# Tables of several rows sort by a click on a column's head: numbers by their size,
# units of time and thousands counted in, what is missing last.
_SORT = """
const SCALE = {n: 1e-9, "\u00b5": 1e-6, m: 1e-3, k: 1e3, M: 1e6, G: 1e9, T: 1e12};
function size(text) {
  const found = text.match(/^(-?[\\d,]*\\.?\\d+(?:e[+-]?\\d+)?)\\s*([a-zA-Z\u00b5]*)/);
  if (!found) return null;
  const unit = found[2], small = unit.length > 1 || "kMGT".includes(unit);
  return parseFloat(found[1].replaceAll(",", "")) * (small && SCALE[unit[0]] || 1);
}
function order(a, b) {
  const gone = (t) => t === "" || t === "-" || t === "\u2013";
  if (gone(a) || gone(b)) return [gone(a) - gone(b), true];
  const x = size(a), y = size(b);
  return [x !== null && y !== null ? x - y : a.localeCompare(b), false];
}
for (const table of document.querySelectorAll(".scroll > table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[place].textContent.trim();
      const rows = [...body.rows].sort((one, two) => {
        const [found, fixed] = order(text(one), text(two));
        return down && !fixed ? -found : found;
      });
      body.append(...rows);
    };
    head.className += " sorts"; head.tabIndex = 0; head.onclick = sort;
    head.onkeydown = (event) => { if (event.key === "Enter") sort(); };
  });
}
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return the document of (heading, HTML) sections; empty ones are left out."""
    body = "".join(
        f"<section><h2>{_text(heading)}</h2>{content}</section>\n"
        for heading, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}{STYLE}</style></head>\n<body>"
        f'<h1>{_text(title)}</h1><p class="soft">{_text(subtitle)}</p>\n'
        f"{body}<script>{_SORT}</script></body></html>\n"
    )


def _text(text: str) -> str:
    """Return text of one line as HTML: no markup, no control characters."""
    return html.escape(escape_line(text))


def picture(pngs: Mapping[str, bytes], text: str) -> str:
    """Return an embedded picture that follows the reader's theme."""
    if not pngs:
        return ""
    dark = ""
    if "dark" in pngs:
        dark = (
            '<source media="(prefers-color-scheme: dark)" '
            f'srcset="{data_uri(pngs["dark"])}">'
        )
    alt = _text(text)
    return f'<picture>{dark}<img src="{data_uri(pngs["light"])}" alt="{alt}"></picture>'


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table; cells that are numbers (of any unit) align right."""
    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [
        all(not c[i] or c[i][0].isdigit() or c[i] == "-" for c in cells)
        for i in range(len(header))
    ]

    def line(tag: str, row: Sequence[str]) -> str:
        tags = (
            f"<{tag}{' class=number' if right else ''}>{_text(cell)}</{tag}>"
            for cell, right in zip(row, numeric, strict=True)
        )
        return f"<tr>{''.join(tags)}</tr>"

    body = "".join(line("td", row) for row in cells)
    return (
        f'<div class="scroll"><table><thead>{line("th", header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def fold(summary: str, content: str) -> str:
    """Return content that opens on a click."""
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def paragraph(text: str) -> str:
    """Return one paragraph of plain text."""
    return f"<p>{_text(text)}</p>"


def alarms(texts: Sequence[str]) -> str:
    """Return warnings as a list that stands out."""
    items = "".join(f"<li>⚠ {_text(text)}</li>" for text in texts)
    return f'<ul class="alarms">{items}</ul>'
