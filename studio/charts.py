"""Rows in, plotly Figure out. Colours stay apart for colour-blind eyes, and every line and bar bears its own name.

Words come in translated. Backgrounds are transparent: the page gives light or dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go

from studio.probes.paired import Interval
from studio.recommend import Candidate
from studio.store.metrics import Point

# Okabe and Ito's hues, shifted until each is 3:1 against white and against the dark background alike.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2E86C8", "#D9660A", "#12906A", "#B5659A", "#7F8792"
OCHRE, RED = "#9A7B1E", "#D1433F"
RUN_COLORS = (BLUE, ORANGE, GREEN, PURPLE, OCHRE, GREY)
MAX_POINTS = 2000
CHART_HEIGHT = 300
BAR_STEP, GROUP_STEP = 0.85, 2.9
SHARE_TEXT_WIDTH = 124
"""Pixels beside the bars for '100%  (117 / 117)', on a narrow page as on a wide one."""
GRID = "rgba(127,135,146,0.22)"
FEW_STEPS = 10
"""Up to this step Plotly would put ticks between two steps, or nearly so."""


@dataclass(frozen=True)
class Line:
    """One series. `faint` lines are the background of another; `markers` show where sparse points were measured."""

    name: str
    points: Sequence[Point]
    color: str = BLUE
    faint: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Share:
    """A measured share in 0..1 with its interval, base beside tuned; `counts` such as "3 / 40" go on the bars."""

    label: str
    base: float
    base_interval: tuple[float, float]
    tuned: float
    tuned_interval: tuple[float, float]
    base_counts: str = ""
    tuned_counts: str = ""


@dataclass(frozen=True)
class Spot:
    """A checkpoint in the plane of what it costs (x, less is better) and what it learnt (y, more is better), both
    (value, low, high). `mark` is its shape: circle, x for overfitted, star for the recommended one."""

    label: str
    hint: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    color: str = BLUE
    mark: str = "circle"


def loss_chart(
    train: Sequence[Point],
    valid: Sequence[Point],
    *,
    train_label: str,
    valid_label: str,
    step_label: str,
    loss_label: str,
    smoothing: float = 0.0,
    log: bool = False,
) -> go.Figure:
    """Training and validation loss over steps. `smoothing` in 0..1 draws an average over the faint raw line."""
    lines = [Line(train_label, train)]
    if smoothing > 0:
        lines = [Line("", train, faint=True), Line(train_label, smooth(train, smoothing))]
    if any(point.value is not None for point in valid):
        lines.append(Line(valid_label, valid, ORANGE, markers=True))
    return line_chart(lines, step_label, loss_label, log=log)


def line_chart(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    log: bool = False,
    height: int = CHART_HEIGHT,
    names: Literal["ends", "top"] = "ends",
) -> go.Figure:
    """Lines over steps, from the first step to the last; NULL values are gaps. Names stand at the lines' ends, or, for
    lines that end close together, above the chart."""
    figure = go.Figure()
    for line in lines:
        figure.add_trace(_trace(line))
    with_name = [line for line in lines if line.name]
    if names == "ends" and len(with_name) > 1:
        _name_ends(figure, with_name, log)
    figure.update_layout(**_layout(height), hovermode="x unified", uirevision="keep")
    last = max((point.step for line in lines for point in line.points), default=0)
    figure.update_xaxes(title=x_title, gridcolor=GRID, rangemode="tozero", dtick=1 if 0 < last <= FEW_STEPS else None)
    figure.update_yaxes(title=y_title, gridcolor=GRID, type="log" if log else "linear", zeroline=False)
    if names == "top" and len(with_name) > 1:
        figure.update_traces(showlegend=True)
        figure.update_layout(legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0})
    return figure


def add_below(figure: go.Figure, lines: Sequence[Line], y_title: str, *, height: int = 170) -> go.Figure:
    """Put a second chart under one of lines, over the same steps: one axis, one pointer. Returns the figure."""
    share = height / (CHART_HEIGHT + height)
    for line in lines:
        figure.add_trace(_trace(line).update(yaxis="y2"))
    margin = figure.layout.margin.r or 0
    _name_ends(figure, [line for line in lines if line.name], log=False, axis="y2")
    figure.update_layout(
        height=CHART_HEIGHT + height,
        margin_r=max(margin, figure.layout.margin.r),
        hoversubplots="axis",
        xaxis_anchor="y2",
        yaxis_domain=[share + 0.05, 1],
        yaxis2={
            "domain": [0, share - 0.02], "anchor": "x", "title": y_title, "gridcolor": GRID, "zeroline": False,
            "tickformat": ".0%",
        },
    )  # fmt: skip
    return figure


def small_chart(
    points: Sequence[Point], x_title: str, y_title: str, color: str = BLUE, number_format: str = ""
) -> go.Figure:
    """One quantity over steps, small, to stand beside others; its name is the axis title."""
    figure = line_chart([Line("", points, color)], x_title, y_title, height=190)
    if number_format:
        figure.update_yaxes(tickformat=number_format)
    return figure


def share_chart(shares: Sequence[Share], *, base_label: str, tuned_label: str, axis_label: str) -> go.Figure:
    """Shares as horizontal bars with interval whiskers, tuned under base, in the order given from the top."""
    figure = go.Figure()
    for name, color, side, offset in ((base_label, GREY, "base", 0.0), (tuned_label, BLUE, "tuned", BAR_STEP)):
        figure.add_trace(_share_bars(shares, name, color, side, offset))
        figure.add_trace(_share_texts(shares, side, offset))
    for number, share in enumerate(shares):
        figure.add_annotation(
            x=0, y=number * GROUP_STEP - 0.85, text=share.label, showarrow=False, xanchor="left", font={"size": 14}
        )
    rows = [number * GROUP_STEP + offset for number in range(len(shares)) for offset in (0.0, BAR_STEP)]
    names = [base_label, tuned_label] * len(shares)
    figure.update_layout(**_layout(70 + 112 * len(shares)), showlegend=False)
    figure.update_xaxes(
        title=axis_label, range=[0, 1], tickvals=[0, 0.25, 0.5, 0.75, 1], tickformat=".0%", gridcolor=GRID
    )
    figure.update_yaxes(
        range=[rows[-1] + 0.7 if rows else 1, -1.3], tickvals=rows, ticktext=names, showgrid=False, zeroline=False
    )
    figure.update_layout(xaxis_fixedrange=True, yaxis_fixedrange=True, margin_r=SHARE_TEXT_WIDTH)
    return figure


def tradeoff_chart(
    spots: Sequence[Spot], front: Sequence[tuple[float, float]], *, x_title: str, y_title: str, height: int = 340
) -> go.Figure:
    """Checkpoints with their intervals, and the front: the most that was learnt at each cost. Best is top left."""
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in front], y=[y for _, y in front], mode="lines", hoverinfo="skip",
            line={"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        )
    )  # fmt: skip
    with_label = apart(spots)
    for spot in spots:
        figure.add_trace(_spot(spot, spot.label if spot in with_label else ""))
    figure.update_layout(**_layout(height), showlegend=False)
    figure.update_xaxes(title=x_title, tickformat=".0%", gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(title=y_title, tickformat=".0%", gridcolor=GRID, range=[-0.06, 1.12], zerolinecolor=GRID)
    return figure


def spot(each: Candidate, cost: Interval | None, is_chosen: bool, color: str, hint: str) -> Spot:
    """A checkpoint as a point of `tradeoff_chart`: red where overfitted, a star where recommended."""
    is_overfitted = each.overfit.verdict == "overfitted"
    return Spot(
        label=str(each.step),
        hint=hint,
        x=cost or (0.0, 0.0, 0.0),
        y=each.identity or (0.0, 0.0, 0.0),
        color=RED if is_overfitted else color,
        mark="star" if is_chosen else "x" if is_overfitted else "circle",
    )


def histogram_chart(bins: Sequence[tuple[int, int, int]], *, x_title: str, y_title: str) -> go.Figure:
    """Counts of neighbouring ranges, each (from, below, count), as bars without gaps."""
    figure = go.Figure(
        go.Bar(
            x=[(begin + end) / 2 for begin, end, _ in bins],
            y=[count for _, _, count in bins],
            width=[0.94 * (end - begin) for begin, end, _ in bins],
            customdata=[f"{begin} – {end - 1}" for begin, end, _ in bins],
            hovertemplate="%{customdata}: %{y}<extra></extra>",
            marker_color=BLUE,
        )
    )
    figure.update_layout(**_layout(CHART_HEIGHT))
    figure.update_xaxes(title=x_title, gridcolor=GRID, rangemode="tozero")
    figure.update_yaxes(title=y_title, gridcolor=GRID, zeroline=False)
    return figure


def smooth(points: Sequence[Point], weight: float) -> list[Point]:
    """Exponential average with the start's bias removed; a gap stays a gap and does not disturb what follows."""
    average, mass, smoothed = 0.0, 0.0, []
    for point in points:
        if point.value is None:
            smoothed.append(point)
            continue
        average = weight * average + (1 - weight) * point.value
        mass = weight * mass + (1 - weight)
        smoothed.append(Point(point.step, average / mass, point.at))
    return smoothed


def thin_out(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most `max_points` points over the whole range: of each stretch the lowest, the highest, and a gap if any."""
    if len(points) <= max_points:
        return list(points)
    first, *inner, last = points
    num_stretches = max(1, (max_points - 2) // 3)
    kept = [first]
    for number in range(num_stretches):
        start, end = (len(inner) * n // num_stretches for n in (number, number + 1))
        kept += _extremes(inner[start:end])
    return [*kept, last]


def _extremes(stretch: Sequence[Point]) -> list[Point]:
    measured = [point for point in stretch if point.value is not None]
    kept = {point.step: point for point in stretch if point.value is None and len(measured) < len(stretch)}
    kept = dict(list(kept.items())[:1])
    if measured:
        for point in (min(measured, key=_value), max(measured, key=_value)):
            kept[point.step] = point
    return [kept[step] for step in sorted(kept)]


def _value(point: Point) -> float:
    return point.value if point.value is not None else float("nan")


def _trace(line: Line) -> go.Scatter:
    points = thin_out(line.points)
    return go.Scatter(
        x=[point.step for point in points],
        y=[point.value for point in points],
        name=line.name,
        mode="lines+markers" if line.markers or len(points) == 1 else "lines",
        line={"color": line.color, "width": 1 if line.faint else 2},
        opacity=0.35 if line.faint else 1.0,
        marker={"size": 6},
        connectgaps=line.markers,
        hoverinfo="skip" if line.faint else None,
        hovertemplate=None if line.faint else "%{y:.4g}",
        showlegend=False,
    )


def apart(spots: Sequence[Spot]) -> list[Spot]:
    """Those whose labels have room, the recommended one and late ones first; the others are named under the pointer."""
    span = max((spot.x[0] for spot in spots), default=0.0) - min((spot.x[0] for spot in spots), default=0.0) or 1.0
    kept: list[Spot] = []
    for spot in sorted(reversed(spots), key=lambda spot: spot.mark != "star"):
        if all(abs(spot.x[0] - one.x[0]) > 0.07 * span or abs(spot.y[0] - one.y[0]) > 0.06 for one in kept):
            kept.append(spot)
    return kept


def _spot(spot: Spot, label: str) -> go.Scatter:
    starred = spot.mark == "star"
    return go.Scatter(
        x=[spot.x[0]],
        y=[spot.y[0]],
        text=[f"<b>{label}</b>" if starred else label],
        mode="markers+text",
        textposition="top right",
        textfont={"color": spot.color, "size": 14 if starred else 12},
        marker={"color": spot.color, "symbol": spot.mark, "size": 17 if starred else 9},
        error_x=_whisker(spot.x, spot.color),
        error_y=_whisker(spot.y, spot.color),
        hovertemplate=f"{spot.hint}<extra></extra>",
        cliponaxis=False,
    )


def _whisker(interval: tuple[float, float, float], color: str) -> dict:
    value, low, high = interval
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - value)],
        "arrayminus": [max(0.0, value - low)],
        "thickness": 1,
        "width": 0,
        "color": f"rgba({red},{green},{blue},0.45)",
    }


def _name_ends(figure: go.Figure, lines: Sequence[Line], log: bool, axis: str = "y") -> None:
    """Write each line's name beside its last point, moved apart when two lines end close together."""
    ends = [(line, last) for line in lines if (last := _last_measured(line.points))]
    ends.sort(key=lambda pair: _value(pair[1]))
    values = [value for line in lines for point in line.points if (value := point.value) is not None]
    spread = (max(values) - min(values)) if values else 0.0
    for number, (line, last) in enumerate(ends):
        close = number > 0 and _value(last) - _value(ends[number - 1][1]) < 0.09 * spread
        close_above = number + 1 < len(ends) and _value(ends[number + 1][1]) - _value(last) < 0.09 * spread
        figure.add_annotation(
            x=last.step,
            y=_log10(_value(last)) if log else last.value,
            yref=axis,
            text=line.name,
            font={"color": line.color, "size": 13},
            showarrow=False,
            xanchor="left",
            xshift=8,
            yshift=9 if close else (-9 if close_above else 0),
        )
    longest = max((len(line.name) + sum(ord(c) > 0x2E80 for c in line.name) for line in lines), default=0)
    figure.update_layout(margin_r=24 + 8 * longest)


def _last_measured(points: Sequence[Point]) -> Point | None:
    return next((point for point in reversed(points) if point.value is not None), None)


def _log10(value: float) -> float:
    """Annotations on a log axis want the exponent."""
    return math.log10(value) if value > 0 else 0.0


def _share_bars(shares: Sequence[Share], name: str, color: str, side: str, offset: float) -> go.Bar:
    values = [getattr(share, side) for share in shares]
    intervals = [getattr(share, f"{side}_interval") for share in shares]
    return go.Bar(
        orientation="h",
        y=[number * GROUP_STEP + offset for number in range(len(shares))],
        x=values,
        width=0.62,
        name=name,
        marker={"color": color, "cornerradius": 3},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
            "arrayminus": [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
            "thickness": 1.6,
            "width": 6,
            "color": ORANGE,
        },
        hovertemplate=f"{name}: %{{x:.1%}}<extra></extra>",
    )


def _share_texts(shares: Sequence[Share], side: str, offset: float) -> go.Scatter:
    """The share in figures, to the right of its whisker."""
    return go.Scatter(
        x=[getattr(share, f"{side}_interval")[1] for share in shares],
        y=[number * GROUP_STEP + offset for number in range(len(shares))],
        text=[f"  {getattr(share, side):.0%}  {getattr(share, f'{side}_counts')}" for share in shares],
        mode="text",
        textposition="middle right",
        hoverinfo="skip",
        cliponaxis=False,
    )


def _layout(height: int) -> dict:
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 13},
    }
