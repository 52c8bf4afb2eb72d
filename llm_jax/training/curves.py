"""A line chart as inline SVG."""

import html
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 150, 46, 18, 8
# More points than pixels only make the page heavy.
_MOST_POINTS = 400


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """`<figure>` of (step, value) points in order, with the last value in its caption."""
    last = points[-1][1]
    stride = -(-len(points) // _MOST_POINTS)
    shown = [*points[:-1:stride], points[-1]]
    steps, values = zip(*shown)
    x_low, x_high = min(steps), max(steps)
    low, high = min(values), max(values)

    def x(step: float) -> float:
        share = (step - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - 6)

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    marks = []
    for value in dict.fromkeys((low, high)):
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 6}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(f'<text x="{_LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((x_low, "start"), (x_high, "end")) if x_high > x_low else ((x_low, "middle"),):
        marks.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{step:g}</text>')
    if len(shown) == 1:
        drawn = f'<circle class="point" cx="{x(steps[0]):.1f}" cy="{y(values[0]):.1f}" r="3"/>'
    else:
        drawn = f'<polyline class="curve" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in shown)}"/>'
    label = html.escape(name)
    return (
        f'<figure><figcaption><span>{label}</span><span class="value">{last:.5g}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}: {last:.5g} at step {steps[-1]:g}">'
        f"{''.join(marks)}{drawn}</svg></figure>"
    )
