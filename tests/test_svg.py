"""Charts of reports: values lie where they should, gaps stay gaps, text stays text."""

import xml.etree.ElementTree as ET

from studio import svg
from studio.charts import Line, Spot
from studio.store.metrics import Point

NUMBERS = (0.1, 0.05, 0.15)


def points(*values: float | None) -> list[Point]:
    return [Point(step, value, "") for step, value in enumerate(values, start=1)]


def drawn(text: str) -> ET.Element:
    return ET.fromstring(text)


def test_a_gap_parts_a_line_and_sparse_points_are_joined_over_it() -> None:
    values = points(3, 2, None, 1, 0.5)
    whole, parted = (drawn(svg.line_chart([Line("a", values, markers=marked)], "x", "y")) for marked in (True, False))
    assert len(whole.findall("polyline")) == 1 and len(whole.findall("circle")) == 4
    assert len(parted.findall("polyline")) == 2 and not parted.findall("circle")


def test_higher_values_lie_higher_and_later_ones_to_the_right() -> None:
    [line] = drawn(svg.line_chart([Line("a", points(1, 2, 4))], "x", "y")).findall("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in places)


def test_axes_bear_round_numbers() -> None:
    texts = [text.text for text in drawn(svg.line_chart([Line("a", points(0.0, 1.0))], "x", "y")).iter("text")]
    assert {"0", "0.25", "0.5", "0.75", "1"} <= set(texts) or {"0", "0.2", "0.4", "0.6", "0.8", "1"} <= set(texts)


def test_nothing_measured_draws_nothing() -> None:
    assert svg.line_chart([Line("a", points(None, None))], "x", "y") == ""
    assert svg.line_chart([], "x", "y") == svg.tradeoff_chart([], [], "x", "y") == ""


def test_one_constant_point_is_a_dot() -> None:
    assert len(drawn(svg.line_chart([Line("a", points(2.0))], "x", "y")).findall("circle")) == 1


def test_checkpoints_have_shapes_and_their_names_are_text() -> None:
    spots = [
        Spot("6", "<b>run</b>", NUMBERS, (0.2, 0.1, 0.3)),
        Spot("12", "run", NUMBERS, (0.9, 0.8, 1.0), mark="star"),
        Spot("18", "run", (0.9, 0.8, 1.0), (1.0, 0.9, 1.0), mark="x"),
    ]
    figure = drawn(svg.tradeoff_chart(spots, [(0.1, 0.9), (0.9, 1.0)], "leakage", "identity"))
    assert [len(list(figure.iter(tag))) for tag in ("circle", "polygon", "path")] == [1, 1, 1]
    assert figure.find("g/title").text == "<b>run</b>"
    assert len(figure.find("polyline").get("points").split()) == 3  # a step of stairs
