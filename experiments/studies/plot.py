"""Curves over one pair of axes as an SVG file, without a library."""

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

PALETTE = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#9498a0", "#a463f2", "#6cc5b0", "#9c6b4e", "#ff8ab7", "#1f3a93")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 360, 52, 14, 34

Curve = list[tuple[float, float]]


def lines(curves: Mapping[str, Curve], caption: str, *, log_x: bool = False, log_y: bool = False) -> str:
    """All curves, each named at its end, in the order given; `caption` stands below the axis of x."""
    right = 24 + 7 * max(len(name) for name in curves)
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]

    def scale(values: list[float], log: bool, start: float, stop: float):
        """From a value to its place, and the values at five marks."""
        to, back = (math.log2, lambda v: 2.0**v) if log else (float, float)
        low, high = to(min(values)), to(max(values))
        span = max(high - low, 1e-9)
        marks = [back(low + span * i / 4) for i in range(5)]
        return lambda value: start + (to(value) - low) / span * (stop - start), marks

    x, x_marks = scale(xs, log_x, LEFT, WIDTH - right)
    y, y_marks = scale(ys, log_y, HEIGHT - BOTTOM, TOP)
    parts = []
    for i in range(5):
        parts.append(f'<path d="M{LEFT} {y(y_marks[i]):.1f}H{WIDTH - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(y_marks[i]) + 4:.1f}" text-anchor="end">{y_marks[i]:.3g}</text>')
        anchor = "end" if i == 4 else "middle"
        place = f'x="{x(x_marks[i]):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="{anchor}">{x_marks[i]:.5g}</text>')
    middle = LEFT + (WIDTH - LEFT - right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(caption)}</text>')
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(curves)}
    below = float(HEIGHT)
    # From the lowest end upwards, so that no name covers another.
    for name, curve in sorted(curves.items(), key=lambda item: item[1][-1][1]):
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve)
        below = min(y(curve[-1][1]) + 4, below - 14)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - right + 6}" y="{below:.1f}" fill="{colours[name]}">{escape(name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
