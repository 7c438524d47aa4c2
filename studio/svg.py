"""The charts of a report as inline SVG: a few kilobytes, no script, and sharp on paper as on a screen.

Text and axes take the page's own colour, so that one file fits a light and a dark screen.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studio.charts import GREY, Line, Spot, apart, thin_out

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 70, 18, 14, 42
NUM_TICKS = 5
MAX_POINTS = 400
Number = Callable[[float], str]


@dataclass(frozen=True)
class Plane:
    """The drawing area: where a value lies, in pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_chart(lines: Sequence[Line], x_title: str, y_title: str, number: Number | None = None) -> str:
    """Lines over steps; gaps stay gaps. Their names are the page's, by colour. "" when nothing was measured."""
    drawn = [(line, thin_out(line.points, MAX_POINTS)) for line in lines]
    measured = [(p.step, p.value) for _, points in drawn for p in points if p.value is not None]
    if not measured:
        return ""
    plane = _plane([x for x, _ in measured] + [0], [y for _, y in measured])
    parts = [_path(line, points, plane) for line, points in drawn]
    return _svg(plane, parts, x_title, y_title, _short, number or _short)


def tradeoff_chart(spots: Sequence[Spot], front: Sequence[tuple[float, float]], x_title: str, y_title: str) -> str:
    """Checkpoints with their intervals and the front, as `charts.tradeoff_chart` draws them. "" without any."""
    if not spots:
        return ""
    plane = _plane([value for spot in spots for value in (*spot.x, 0.0)], [0.0, 1.0])
    steps = [f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in _stairs(front)]
    line = (
        f'<polyline points="{" ".join(steps)}" fill="none" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="2 4"/>'
    )
    with_label = apart(spots)
    drawn = [_spot(spot, plane, spot.label if spot in with_label else "") for spot in spots]
    return _svg(plane, [line, *drawn], x_title, y_title, _percent, _percent)


def _stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front as steps: what one gets at a cost stays the same until the next checkpoint."""
    points: list[tuple[float, float]] = []
    for x, y in front:
        points += [(x, points[-1][1]), (x, y)] if points else [(x, y)]
    return points


def _plane(xs: Sequence[float], ys: Sequence[float]) -> Plane:
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    x_room, y_room = 0.03 * (x_high - x_low) or 1.0, 0.06 * (y_high - y_low) or abs(y_low) or 1.0
    return Plane(x_low - (x_room if x_low < 0 else 0), x_high + x_room, y_low - y_room, y_high + y_room)


def _svg(plane: Plane, parts: Sequence[str], x_title: str, y_title: str, x_number: Number, y_number: Number) -> str:
    label = html.escape(f"{y_title}, {x_title}", quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"{_axes(plane, x_title, y_title, x_number, y_number)}{''.join(parts)}</svg>"
    )


def _axes(plane: Plane, x_title: str, y_title: str, x_number: Number, y_number: Number) -> str:
    parts = []
    for value in _ticks(plane.y_low, plane.y_high):
        y = plane.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(LEFT - 7, y + 4, y_number(value), "end"))
    for value in _ticks(plane.x_low, plane.x_high):
        parts.append(_label(plane.x(value), HEIGHT - BOTTOM + 17, x_number(value), "middle"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<text class="axis" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
    return "".join([*parts, f"{turned}{html.escape(y_title)}</text>"])


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two values."""
    raw = (high - low) / NUM_TICKS
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _path(line: Line, points: Sequence, plane: Plane) -> str:
    """One stroke for each stretch without a gap; sparse points are joined over gaps and marked."""
    strokes: list[list[str]] = [[]]
    for point in points:
        if point.value is not None:
            strokes[-1].append(f"{plane.x(point.step):.1f},{plane.y(point.value):.1f}")
        elif not line.markers:
            strokes.append([])
    drawn = [
        f'<polyline points="{" ".join(stroke)}" fill="none" stroke="{line.color}" stroke-width="1.8"/>'
        for stroke in strokes
        if len(stroke) > 1
    ]
    dots = [dot for stroke in strokes for dot in stroke] if line.markers else [s[0] for s in strokes if len(s) == 1]
    return "".join(drawn + [_dot(dot, line.color) for dot in dots])


def _dot(place: str, color: str) -> str:
    x, y = place.split(",")
    return f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'


def _spot(spot: Spot, plane: Plane, label: str) -> str:
    x, y = plane.x(spot.x[0]), plane.y(spot.y[0])
    parts = [f"<title>{html.escape(spot.hint)}</title>"]
    for x1, x2, y1, y2 in (
        (plane.x(spot.x[1]), plane.x(spot.x[2]), y, y),
        (x, x, plane.y(spot.y[1]), plane.y(spot.y[2])),
    ):
        line = f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{spot.color}" opacity=".45"/>'
        parts.append(line)
    parts.append(_shape(spot.mark, x, y, spot.color))
    weight = ' font-weight="700"' if spot.mark == "star" else ""
    text = f'<text class="axis"{weight} x="{x + 8:.1f}" y="{y - 6:.1f}" fill="{spot.color}">{html.escape(label)}'
    return f"<g>{''.join(parts)}{text}</text></g>"


def _shape(mark: str, x: float, y: float, color: str) -> str:
    if mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
    if mark == "x":
        path = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<path d="{path}" stroke="{color}" stroke-width="2.5" fill="none"/>'
    corners = [(9 if n % 2 == 0 else 3.8, math.pi * (n / 5 - 0.5)) for n in range(10)]
    points = " ".join(f"{x + r * math.cos(turn):.1f},{y + r * math.sin(turn):.1f}" for r, turn in corners)
    return f'<polygon points="{points}" fill="{color}"/>'


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _short(value: float) -> str:
    """0.0005 -> 5e-04, 1200000 -> 1.2e+06, otherwise as it is."""
    return f"{value:.3g}"
