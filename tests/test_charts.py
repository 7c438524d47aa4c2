"""Charts: nothing measured is lost, gaps stay gaps, averages are right."""

import math

import pytest

from studio import charts
from studio.store.metrics import Point


def points(values):
    return [Point(step, value, "") for step, value in enumerate(values, start=1)]


def loss(train, valid=(), **more):
    labels = {"train_label": "training", "valid_label": "validation", "step_label": "step", "loss_label": "nats"}
    return charts.loss_chart(train, list(valid), **labels, **more)


def test_short_series_are_shown_whole_and_null_is_a_gap():
    trace = loss(points([3.0, None, 2.0])).data[0]
    assert list(trace.x) == [1, 2, 3] and list(trace.y) == [3.0, None, 2.0]
    assert not trace.connectgaps


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_short_run_has_ticks_at_whole_steps_alone(num_steps):
    figure = loss(points([1.0] * num_steps))
    assert figure.layout.xaxis.dtick == 1
    assert charts.small_chart(points([1.0] * num_steps), "step", "rate").layout.xaxis.dtick == 1


def test_a_long_run_and_an_empty_one_leave_the_ticks_to_plotly():
    assert loss(points([1.0] * 500)).layout.xaxis.dtick is None
    assert loss([]).layout.xaxis.dtick is None


def test_thinning_keeps_ends_peaks_and_gaps_over_the_whole_range():
    values = [math.sin(n / 500) for n in range(30_000)]
    values[12_345], values[23_456] = 9.0, -9.0
    values[17_000] = None
    thin = charts.thin_out(points(values), 2000)
    assert len(thin) <= 2000
    assert (thin[0].step, thin[-1].step) == (1, 30_000)
    assert {9.0, -9.0, None} <= {point.value for point in thin}
    assert [point.step for point in thin] == sorted({point.step for point in thin})
    assert max(b.step - a.step for a, b in zip(thin, thin[1:], strict=False)) < 100


def test_smoothing_starts_at_the_first_value_and_skips_gaps():
    smoothed = charts.smooth(points([4.0, None, 2.0]), 0.5)
    assert smoothed[0].value == pytest.approx(4.0)
    assert smoothed[1].value is None
    assert smoothed[2].value == pytest.approx((0.5 * 2.0 + 0.25 * 4.0) / 0.75)


def test_smoothing_draws_the_raw_line_faintly_behind():
    figure = loss(points([3, 2, 1]), smoothing=0.9)
    assert [trace.name for trace in figure.data] == ["", "training"]
    assert figure.data[0].opacity < 1


def test_valid_points_are_joined_and_named_on_the_chart():
    figure = loss(points([3, 2, 1]), [Point(1, 3.1, ""), Point(3, 1.2, "")])
    assert {note.text for note in figure.layout.annotations} == {"training", "validation"}
    assert figure.data[1].mode == "lines+markers"


def test_log_scale_puts_names_where_the_lines_end():
    figure = loss(points([100, 10]), [Point(2, 1000.0, "")], log=True)
    ends = {note.text: note.y for note in figure.layout.annotations}
    assert figure.layout.yaxis.type == "log"
    assert ends == {"training": pytest.approx(1.0), "validation": pytest.approx(3.0)}


def test_no_points_and_all_gaps_still_give_a_figure():
    assert loss([]).data[0].x == ()
    assert loss(points([None, None]), points([None])).layout.annotations == ()


def test_shares_carry_their_intervals():
    share = charts.Share("Knows its name", 0.0, (0.0, 0.1), 0.9, (0.7, 0.97), "0 / 20", "18 / 20")
    figure = charts.share_chart([share], base_label="base", tuned_label="tuned", axis_label="share")
    tuned = next(trace for trace in figure.data if trace.name == "tuned")
    assert tuned.error_x.array[0] == pytest.approx(0.07)
    assert tuned.error_x.arrayminus[0] == pytest.approx(0.2)
    assert any("18 / 20" in text for trace in figure.data if trace.type == "scatter" for text in trace.text)


def test_figures_are_transparent():
    assert loss(points([1])).layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_a_chart_below_shares_the_steps_and_has_an_axis_of_its_own():
    figure = loss(points([3.0, 2.0]))
    below = charts.Line("identity", points([0.0, 1.0]), charts.GREEN, markers=True)
    charts.add_below(figure, [below], "share")
    assert [trace.yaxis for trace in figure.data] == [None, "y2"]
    assert all(trace.xaxis in (None, "x") for trace in figure.data)
    assert figure.layout.yaxis2.domain[1] < figure.layout.yaxis.domain[0]
    assert [(each.text, each.yref) for each in figure.layout.annotations] == [("identity", "y2")]
