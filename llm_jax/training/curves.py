"""Line charts as inline SVG: a metric of one or several runs, over steps, tokens, time and flops.

All of a figure's axes are drawn; the page shows one of them, chosen by radio buttons and CSS alone.
"""

import math
from collections.abc import Mapping, Sequence

from llm_jax.training.page import color, key, text
from llm_jax.training.runs import AXES, Points, in_order

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 340, 170, 44, 16, 18, 8
# More points than pixels only make the page heavy.
_MOST_POINTS = 300

Curves = Mapping[str, Mapping[str, Points]]


def curves_style(runs: int) -> str:
    """Shows the axis that is chosen, and the runs that are ticked."""
    rules = []
    for axis in AXES:
        rules.append(f"body:not(:has(#by-{axis}:checked)) .by-{axis} {{ display: none; }}")
    for run in range(runs if runs > 1 else 0):
        rules.append(f"body:has(#run-{run}:not(:checked)) .run-{run} {{ display: none; }}")
    return "\n".join(rules)


def controls(labels: Sequence[str], curves: Sequence[Curves]) -> str:
    """The radio buttons of the axes that some run has, and for several runs the legend, with a tick for each."""
    there = {axis for run in curves for by_axis in run.values() for axis in by_axis}
    axes = "".join(
        f'<label><input type="radio" name="axis" id="by-{axis}"{" checked" if axis == "steps" else ""}>{axis}</label>'
        for axis in AXES
        if axis in there or axis == "steps"
    )
    legend = "".join(
        f'<label><input type="checkbox" id="run-{run}" checked>{key(run)}{text(label)}</label>'
        for run, label in enumerate(labels)
    )
    return f'<div class="bar"><span>{axes}</span>{f"<span>{legend}</span>" if len(labels) > 1 else ""}</div>'


def figures(labels: Sequence[str], curves: Sequence[Curves]) -> str:
    """A figure per metric of which some run has more than a point; the others are in the tables."""
    names = in_order([name for run in curves for name in run if len(run[name]["steps"]) > 1])
    drawn = "".join(_figure(name, labels, [run.get(name, {}) for run in curves]) for name in names)
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def _figure(name: str, labels: Sequence[str], runs: Sequence[Mapping[str, Points]]) -> str:
    last = [run["steps"][-1][1] for run in runs if "steps" in run]
    value = f'<span class="value">{last[0]:.5g}</span>' if len(runs) == 1 else ""
    charts = "".join(
        _chart(name, axis, labels, [run.get(axis, []) for run in runs])
        for axis in AXES
        if any(axis in run for run in runs)
    )
    return f"<figure><figcaption><span>{text(name)}</span>{value}</figcaption>{charts}</figure>"


def compared(title: str, lines: Mapping[str, Mapping[str, Points]]) -> str:
    """Several metrics of one run in one figure, each by its label in the legend."""
    labels, by_axis = list(lines), list(lines.values())
    legend = " ".join(f"<span>{key(number)}{text(label)}</span>" for number, label in enumerate(labels))
    charts = "".join(
        _chart(title, axis, labels, [line.get(axis, []) for line in by_axis])
        for axis in AXES
        if any(axis in line for line in by_axis)
    )
    return f"<figure><figcaption><span>{text(title)}</span><span>{legend}</span></figcaption>{charts}</figure>"


def _chart(name: str, axis: str, labels: Sequence[str], runs: Sequence[Points]) -> str:
    places = [point[0] for points in runs for point in points]
    values = [point[1] for points in runs for point in points]
    x_high, low, high = max(places), min(values), max(values)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(place: float) -> float:
        return _LEFT + (place / x_high if x_high else 0.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    marks = []
    for tick in ticks:
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for place in [tick for tick in _ticks(0.0, x_high, 5) if tick <= x_high]:
        marks.append(f'<text x="{x(place):.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{_place(axis, place)}</text>')
    lines = []
    for run, points in enumerate(runs):
        if not points:
            continue
        stride = -(-len(points) // _MOST_POINTS)
        kept = [*points[:-1:stride], points[-1]]
        title = f"<title>{text(labels[run])}: {points[-1][1]:.5g}</title>"
        if len({place for place, _ in kept}) == 1:
            place, value = kept[-1]
            fill = color(run).replace("stroke:", "fill:", 1)
            drawn = f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3.5" style="{fill}">{title}</circle>'
        else:
            path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in kept)
            drawn = f'<polyline class="curve" style="{color(run)}" points="{path}">{title}</polyline>'
        lines.append(f'<g class="run-{run}">{drawn}</g>')
    label = f"{text(name)} over {axis}"
    return (
        f'<svg class="by-{axis}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(marks)}{''.join(lines)}</svg>"
    )


def _ticks(low: float, high: float, parts: int = 3) -> list[float]:
    """Round numbers, `parts` of their distances or fewer within the range, that reach from below `low` to above `high`;
    one where they are equal."""
    if not high > low:
        return [low]
    rough = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if abs(i * step) > 1e-9 else i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    """At most six characters or so."""
    if value and not 1e-4 <= abs(value) < 1e4:
        return _short(value) if abs(value) >= 1e4 else f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _place(axis: str, place: float) -> str:
    if axis == "time":
        if place < 120:
            return f"{place:.3g} s"
        return f"{place / 60:.3g} min" if place < 7200 else f"{place / 3600:.3g} h"
    return f"{place:g}" if axis == "steps" else _short(place)
