"""Curves over one pair of axes as an SVG file, without a library."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

PALETTE = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#9498a0", "#a463f2", "#6cc5b0", "#9c6b4e", "#ff8ab7", "#1f3a93")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 360, 52, 14, 34

Curve = Sequence[tuple[float, float]]


def lines(curves: Mapping[str, Curve], caption: str, *, log_x: bool = False, log_y: bool = False) -> str:
    """All curves, each named at its end, in the order given; `caption` stands below the axis of x."""
    right = 24 + 7 * max(len(name) for name in curves)
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]

    def scale(values: list[float], log: bool, start: float, stop: float):
        """From a value to its place, and the values at the marks: five, or each doubling of whole ones."""
        to, back = (math.log2, lambda v: 2.0**v) if log else (float, float)
        low, high = to(min(values)), to(max(values))
        span = max(high - low, 1e-9)
        doublings = round(span) if log and 1 < span < 8 and math.isclose(span, round(span)) else 4
        marks = [back(low + span * i / doublings) for i in range(doublings + 1)]
        return lambda value: start + (to(value) - low) / span * (stop - start), marks

    x, x_marks = scale(xs, log_x, LEFT, WIDTH - right)
    y, y_marks = scale(ys, log_y, HEIGHT - BOTTOM, TOP)
    parts = []
    for mark in y_marks:
        parts.append(f'<path d="M{LEFT} {y(mark):.1f}H{WIDTH - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:.3g}</text>')
    for mark in x_marks:
        anchor = "end" if mark == x_marks[-1] else "middle"
        place = f'x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="{anchor}">{mark:.5g}</text>')
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
