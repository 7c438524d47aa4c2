"""Runs beside each other: which checkpoint to take, curves on one axis, what differs, scorecards, one report."""

from collections.abc import Mapping, Sequence
from functools import partial

import streamlit as st

from studio import charts, comparison, run_report, scores
from studio.charts import Line
from studio.comparison import AXES, MOST_RUNS, Axis, Change, Comparison
from studio.paths import slugify
from studio.projects import Project
from studio.store.runs import Run
from studio.ui import state
from studio.ui.advice_view import advice_view, percent
from studio.ui.frame import TRAIN, link
from studio.ui.i18n import N_, _
from studio.ui.scorecard_view import NAMES
from studio.ui.widgets import state_word

AXIS_WORDS = {"step": N_("Step"), "tokens": N_("Trained tokens"), "seconds": N_("Seconds since the first step")}
CURVE_WORDS = {
    "train/loss": N_("Training loss"),
    "valid/loss": N_("Validation loss"),
    "probe/identity": N_("Identity on the way"),
    "probe/leakage": N_("Leakage on the way"),
    "train/learning_rate": N_("Learning rate"),
}


def runs_view(project: Project) -> None:
    """Choose runs, then read them together."""
    there = comparison.run_ids_of(project)
    if not there:
        st.info(_("No run yet. Two runs are compared by their curves, settings, data and scorecards."))
        link(TRAIN, _("Train one"))
        return
    chosen = _choose(there)
    if not chosen:
        st.caption(_("Choose one run for advice on its checkpoints, more to compare them."))
        return
    found = comparison.compare(project, chosen)
    advice_view(found.recommendation, _colors(found.runs))
    _curves(found)
    if len(found.runs) > 1:
        _changes(_("Settings that differ"), _("Setting"), found.settings, found.runs, _("All settings are the same."))
        _changes(_("Data that differs"), _("Dataset"), found.data, found.runs, _("All learnt from the same rows."))
    _cards(found)
    _tasks(found)
    _take_along(project, found)


def _choose(there: Sequence[str]) -> list[str]:
    shown = [each for each in state.kept("runs.chosen", list(there[:2])) if each in there]
    st.session_state["runs.picks"] = shown
    return st.multiselect(
        _("Runs"), list(there), max_selections=MOST_RUNS, key="runs.picks",
        on_change=lambda: state.keep("runs.chosen", list(st.session_state["runs.picks"])),
    )  # fmt: skip


def _colors(found: Sequence[Run]) -> dict[str, str]:
    return {run.id: color for run, color in zip(found, charts.RUN_COLORS, strict=False)}


def _curves(found: Comparison) -> None:
    if not found.curves:
        st.caption(_("Curves appear with the first step."))
        return
    colors = _colors(found.runs)
    title, choice = st.columns([3, 2], vertical_alignment="bottom")
    title.markdown(f"**{_('Curves')}**")
    axis = choice.segmented_control(
        _("Along"), list(AXES), format_func=lambda name: _(AXIS_WORDS[name]), default="step", required=True,
        key="runs.axis", label_visibility="collapsed",
    )  # fmt: skip
    shown = list(found.curves)
    for start in range(0, len(shown), 2):
        for column, name in zip(st.columns(2), shown[start : start + 2], strict=False):
            with column:
                _curve(found, name, axis, colors)


def _curve(found: Comparison, name: str, axis: Axis, colors: Mapping[str, str]) -> None:
    sparse = not name.startswith("train/")
    lines = [
        Line(run.id, found.along(name, run.id, axis), colors[run.id], markers=sparse)
        for run in found.runs
        if found.curves[name][run.id]
    ]
    label = _(CURVE_WORDS[name])
    figure = charts.line_chart(lines, _(AXIS_WORDS[axis]), label, height=260, names="top")
    if name.startswith("probe/"):
        figure.update_yaxes(tickformat=".0%")
    if name == "train/learning_rate":
        figure.update_yaxes(tickformat=".1e")
    st.plotly_chart(figure, key=f"runs.curve.{name}", theme="streamlit", config={"displayModeBar": False}, alt=label)


def _changes(title: str, head: str, changes: Sequence[Change], found: Sequence[Run], none: str) -> None:
    st.markdown(f"**{title}**")
    if not changes:
        st.caption(none)
        return
    rows = [
        {head: change.name} | {run.id: value or "–" for run, value in zip(found, change.values, strict=True)}
        for change in changes
    ]
    st.dataframe(rows, hide_index=True, key=f"runs.{head}", alt=title)


def _cards(found: Comparison) -> None:
    st.markdown(f"**{_('Scorecards')}**")
    if not found.cards:
        st.caption(_("None of these runs is scored yet. The tab Scorecard does it."))
        return
    rows = []
    for run in found.runs:
        row = {_("Run"): run.id, _("State"): state_word(run.state), _("Step"): ""}
        if run.id in found.cards:
            evaluation = found.cards[run.id][0]
            row[_("Step")] = str(evaluation.step)
            for line in scores.lines(evaluation.scores):
                row[_(NAMES[line.name])] = percent(line.tuned) + (" ✕" if line.met is False else "")
        rows.append(row)
    st.dataframe(rows, hide_index=True, key="runs.cards", alt=_("Scorecards"))
    st.caption(_("Of each run the checkpoint to take, the newest one where none is recommended. ✕: target missed."))


def _tasks(found: Comparison) -> None:
    """What `retune lm-eval` measured of these runs."""
    if not found.tasks:
        return
    st.markdown(f"**{_('Tasks of lm-evaluation-harness')}**")
    heads = (_("Task"), _("Rows"), _("Run"), _("Step"), _("Base"), _("Tuned"), _("Change"))
    rows = [
        (f"{each.task} · {each.metric}", str(each.num_rows), each.run_id, str(each.step), *each.figures)
        for each in found.tasks
    ]
    rows = [dict(zip(heads, row, strict=True)) for row in rows]
    st.dataframe(rows, hide_index=True, key="runs.tasks", alt=_("Tasks of lm-evaluation-harness"))


def _take_along(project: Project, found: Comparison) -> None:
    """One page that opens anywhere, or Markdown; made when it is asked for."""
    name = slugify("-".join(["compare", *(run.id for run in found.runs)]))
    with st.container(horizontal=True):
        for label, make, suffix, kind in (
            (_("Download as one HTML page"), run_report.as_html, "html", "text/html"),
            (_("Download as Markdown"), run_report.as_markdown, "md", "text/markdown"),
        ):
            st.download_button(
                label, partial(make, found, project.name), f"{name}.{suffix}", kind,
                icon=":material/download:", on_click="ignore", key=f"runs.{suffix}",
            )  # fmt: skip
