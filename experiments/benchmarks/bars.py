"""Horizontal bars in groups as an SVG file, without a library."""

from collections.abc import Mapping
from xml.sax.saxutils import escape

PALETTE = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e", "#9498a0")
WIDTH, LEFT, RIGHT, BAR, GAP = 860, 330, 60, 11, 10


def bars(groups: Mapping[str, Mapping[str, float]], caption: str) -> str:
    """Group -> name -> value; one colour for each name, one scale for all."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    most = max((value for values in groups.values() for value in values.values()), default=1.0)
    parts, y = [], 14.0
    for i, name in enumerate(names):
        column, line = i % 3, i // 3
        x, at = 12 + column * 280, y + 18 * line
        parts.append(f'<rect x="{x}" y="{at - 9}" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 15}" y="{at}">{escape(name)}</text>')
    y += 18 * ((len(names) + 2) // 3) + GAP
    for group, values in groups.items():
        middle = y + BAR * len(values) / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(group)}</text>')
        for name, value in values.items():
            width = (WIDTH - LEFT - RIGHT) * value / most
            parts.append(
                f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 1}" fill="{colours[name]}"/>'
            )
            parts.append(f'<text x="{LEFT + width + 4:.1f}" y="{y + 9:.1f}" font-size="10">{value:.3g}</text>')
            y += BAR
        y += GAP
    parts.append(f'<text x="{WIDTH / 2}" y="{y + 12:.1f}" text-anchor="middle">{escape(caption)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 24:.0f}" font-family="sans-serif" '
        f'font-size="12" fill="#333">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
