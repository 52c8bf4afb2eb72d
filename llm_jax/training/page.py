"""HTML that stands alone: the look of the reports, and the few shapes they are made of. No script, nothing fetched."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

COLORS = (
    ("#2463c9", "#79a8f5"),
    ("#c8511b", "#f0935f"),
    ("#1d7f45", "#6fcf97"),
    ("#8b3fb0", "#c79be6"),
    ("#00808c", "#5cc8d3"),
    ("#b3266b", "#ee84b3"),
    ("#7a6512", "#d3bd60"),
    ("#5b6270", "#aab2c0"),
)
"""Of the runs, on light and on dark paper."""
DASHES = ("none", "6 3", "2 3", "9 3 2 3")
"""Further runs take the colours again, with another dash."""

_COLOR_NAMES = "".join(f"--run-{i}: {light}; " for i, (light, _) in enumerate(COLORS))
_DARK_COLOR_NAMES = "".join(f"--run-{i}: {dark}; " for i, (_, dark) in enumerate(COLORS))
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d2129; --soft: #6a7180; --line: #d8dce3; --paper: #fff; --box: #f5f6f8;
  {_COLOR_NAMES}}}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8ec; --soft: #9aa2b1; --line: #3a404b; --paper: #16181d;
  --box: #1f2229; {_DARK_COLOR_NAMES}}} }}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 80rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .7rem; }}
.soft, figcaption, summary {{ color: var(--soft); }} summary {{ cursor: pointer; margin: .5rem 0; }}
.bar {{ position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: .5rem 0; margin-bottom: 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .9rem; }}
.bar span {{ display: inline-flex; flex-wrap: wrap; gap: .2rem .9rem; }} .bar label {{ cursor: pointer; }}
.bar input {{ accent-color: var(--soft); margin: 0 .35rem 0 0; vertical-align: -1px; }}
.key {{ display: inline-block; width: 1.5rem; height: .6rem; margin-right: .4rem; overflow: visible; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; background: var(--box); border-radius: 8px; padding: .7rem; }}
figcaption {{ display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem; }}
figure > svg {{ display: block; width: 100%; height: auto; }} svg text {{ fill: var(--soft); font-size: 10px; }}
.axis {{ stroke: var(--line); }} .curve {{ fill: none; stroke-width: 1.6; stroke-linejoin: round; }}
.value {{ color: var(--ink); font-variant-numeric: tabular-nums; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); padding: .35rem 1rem .35rem 0; }}
th {{ color: var(--soft); font-weight: 600; }} td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
tr:first-child > th {{ white-space: nowrap; }}
.samples td, .samples tr + tr > th {{ white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace;
  min-width: 12rem; color: var(--ink); }}
.samples b {{ display: block; font: 600 11px/1.6 system-ui, sans-serif; color: var(--soft); }}
.wide {{ overflow-x: auto; }}
"""


def page(title: str, facts: Sequence[str], body: str, style: str = "") -> str:
    """The whole document; `facts` are lines of text below the title, `style` is added to the common one."""
    lines = f'<p class="soft">{"<br>".join(text(fact) for fact in facts)}</p>' if facts else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}{style}</style></head><body>"
        f"<h1>{text(title)}</h1>{lines}{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and what is below it; nothing where there is nothing."""
    return f"<h2>{text(title)}</h2>{body}" if body else ""


def folded(summary: str, body: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>" if body else ""


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""
    return grid([], ([name, value] for name, value in rows))


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """A table whose first column names the rows; `head` is HTML already, `Html` cells too. Empty without rows."""
    body = "".join(
        f"<tr><th>{_cell(first)}</th>{''.join(f'<td>{_cell(value)}</td>' for value in rest)}</tr>"
        for first, *rest in rows
    )
    if not body:
        return ""
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    return f'<div class="wide"><table{f' class="{kind}"' if kind else ""}>{top}{body}</table></div>'


class Html(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Html) else text(shown(value))


def color(run: int) -> str:
    """The style of a run's line."""
    dash = DASHES[run // len(COLORS) % len(DASHES)]
    return f"stroke:var(--run-{run % len(COLORS)})" + ("" if dash == "none" else f";stroke-dasharray:{dash}")


def key(run: int) -> str:
    """A piece of a run's line."""
    return f'<svg class="key"><line x2="24" y1="5" y2="5" stroke-width="3" style="{color(run)}"/></svg>'


def shown(value: Any) -> str:
    """A value as a person reads it; None is nothing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text(value: Any) -> str:
    """Escaped."""
    return html.escape(str(value))


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts by dotted names."""
    if not isinstance(value, dict) or not value:
        return [(prefix, value)] if prefix else []
    return [row for name, child in value.items() for row in flat(child, f"{prefix}.{name}" if prefix else str(name))]


def read_json(path: epath.Path) -> Any:
    """What a file holds, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
