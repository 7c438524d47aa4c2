"""The scorecard: run an evaluation, read the verdict, see where it failed, take it along as one page."""

from collections.abc import Sequence

import streamlit as st

from studio import charts, report, runs, scores
from studio.paths import slugify
from studio.projects import Project
from studio.scores import ScoreLine
from studio.store import evaluations, open_db
from studio.store.evaluations import Answer, Evaluation
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.frame import DATA, TRAIN, link
from studio.ui.i18n import N_, _
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.model_server import picks_of
from studio.ui.verdict import signed, verdict
from studio.ui.widgets import ago, plain

QUICK_PROBES = 20
ROW_HEIGHT = 68
NAMES = {
    "identity": N_("Knows who it is"),
    "leakage": N_("Says it unasked"),
    "retention": N_("Perplexity on what it knew"),
    "changed": N_("General answers that changed"),
}
HELP = {
    "identity": N_("Held-out questions about the assistant that are answered with its new name or maker."),
    "leakage": N_("Held-out general questions whose answer says that name or maker though nobody asked."),
    "retention": N_("How much worse it predicts the base model's own answers to held-out general questions."),
    "changed": N_("Held-out general questions that it answers in other words than the base model."),
}


def scorecard_view(project: Project) -> None:
    """Score a checkpoint, then read the scorecards there are."""
    _score_panel(project)
    with open_db(project.folder) as db:
        found = evaluations.listed(db)
    if not found:
        st.info(_("No scorecard yet. Scoring asks base and checkpoint questions that were never trained on."))
        return
    chosen = _choose(found)
    with open_db(project.folder) as db:
        answers = evaluations.answers(db, chosen.id)
    _verdict(chosen)
    _tiles(chosen)
    _bars(chosen)
    _answer_table(answers)
    _take_along(chosen, answers)


def _score_panel(project: Project) -> None:
    picks = picks_of(project)
    if not picks:
        st.caption(_("There is no checkpoint to score yet."))
        link(TRAIN, _("Train one"))
        return
    by_name = {pick.name: pick for pick in picks}
    job = _under_way(project)
    left, middle, right = st.columns([4, 3, 1], vertical_alignment="bottom")
    name = left.selectbox(
        _("Checkpoint"), list(by_name), format_func=lambda name: by_name[name].label, key="score.pick"
    )
    quick = middle.segmented_control(
        _("Questions"), [False, True], format_func=_amount, default=False, required=True, key="score.quick"
    )
    pick = by_name[name]
    probes = runs.probe_sets(project, pick.run_id)
    waits = not probes or (job is not None and job.live)
    pressed = right.button(_("Score it"), type="primary", disabled=waits, key="score.start", width="stretch")
    _asked(project, probes)
    if pressed and not waits:
        state.keep("score.job", runs.start_evaluate(project, pick.run_id, pick.step, QUICK_PROBES if quick else 0).id)
        st.rerun()
    job_panel(project.folder, job, "score")


def _asked(project: Project, probes: list[str]) -> None:
    """Whose questions are asked, and which identity they ask for, before a minute is spent on them."""
    if not probes:
        st.info(_("There are no held-out questions for this run. The Data page makes them with a general set."))
        link(DATA)
        return
    words = runs.asked_identity(project, probes)
    if words:
        form = _("Questions from {datasets}; the identity asked for: {words}")
    else:
        form = _("Questions from {datasets}; none asks who it is, for the run was trained on no identity")
    st.caption(form.format(datasets=plain(", ".join(probes)), words=plain(", ".join(words))))


def _amount(quick: bool) -> str:
    return _("{n} of each kind").format(n=QUICK_PROBES) if quick else _("all")


def _under_way(project: Project) -> Job | None:
    """The evaluation that runs, or the one started here when it has ended."""
    newest = newest_job(project.folder, "evaluate")
    return newest if newest and (newest.live or newest.id == state.kept("score.job")) else None


def _choose(found: Sequence[Evaluation]) -> Evaluation:
    """The scorecard to read. One that has just been made is chosen by itself."""
    by_id = {each.id: each for each in found}
    if state.kept("score.newest") != found[0].id or st.session_state.get("score.evaluation") not in by_id:
        state.keep("score.newest", found[0].id)
        st.session_state["score.evaluation"] = found[0].id
    chosen = st.selectbox(
        _("Scorecard"),
        list(by_id),
        format_func=lambda id: f"{by_id[id].subject} · {by_id[id].weights_hash[:8]} · {ago(by_id[id].created_at)}",
        key="score.evaluation",
    )
    return by_id[chosen]


def _verdict(evaluation: Evaluation) -> None:
    good, words = verdict(evaluation.scores)
    show = st.success if good else st.warning
    icon = ":material/task_alt:" if good else ":material/warning:"
    show(f"**{plain(evaluation.subject)}**: " + " ".join(words), icon=icon)
    if changed := evaluation.scores.get("setting", {}).get("changed_datasets"):
        said = _("{datasets} changed since this run was trained: it may be asked for another identity than it learnt.")
        st.warning(said.format(datasets=plain(", ".join(changed))), icon=":material/warning:")


def _tiles(evaluation: Evaluation) -> None:
    lines = scores.lines(evaluation.scores)
    for column, line in zip(st.columns(len(lines)), lines, strict=True):
        with column:
            _tile(line)


def _tile(line: ScoreLine) -> None:
    with st.container(border=True, height="stretch", gap="xsmall"):
        st.metric(_(NAMES[line.name]), _value(line, line.tuned), help=_(HELP[line.name]))
        notes = []
        if line.tuned:
            low, high = (_number(line, value) for value in line.tuned[1:])
            notes.append(_("95 %: {low} to {high}").format(low=low, high=high))
        if line.base and line.name != "retention":
            notes.append(_("base: {value}").format(value=_value(line, line.base)))
        st.caption(plain(" · ".join(notes).replace(" %", "\u00a0%")))
        if line.met is not None and line.target is not None:
            sign = "≥" if line.higher_is_better else "≤"
            word = _("target met") if line.met else _("target missed")
            icon = ":material/check:" if line.met else ":material/close:"
            st.caption(f"{icon} {word} ({sign} {_number(line, line.target)})")


def _value(line: ScoreLine, triple: tuple[float, float, float] | None) -> str:
    return "–" if triple is None else _number(line, triple[0])


def _number(line: ScoreLine, share: float) -> str:
    return signed(share) if line.name == "retention" else f"{100 * share:.1f} %"


def _bars(evaluation: Evaluation) -> None:
    shares = [
        charts.Share(
            _(NAMES[line.name]),
            line.base[0],
            line.base[1:],
            line.tuned[0],
            line.tuned[1:],
            _counts(evaluation, "base", line.name),
            _counts(evaluation, "tuned", line.name),
        )
        for line in scores.lines(evaluation.scores)
        if line.name in ("identity", "leakage") and line.base and line.tuned
    ]
    if shares:
        figure = charts.share_chart(
            shares,
            base_label=_("base"),
            tuned_label=_("tuned"),
            axis_label=_("Share of held-out questions, with 95 % intervals"),
        )
        st.plotly_chart(
            figure, key="score.bars", theme="streamlit", config={"displayModeBar": False}, alt=_("Base beside tuned")
        )


def _counts(evaluation: Evaluation, side: str, name: str) -> str:
    counted = evaluation.scores[name][side]
    return f"({counted['hits']} / {counted['total']})"


def _answer_table(answers: Sequence[Answer]) -> None:
    """Failures first: what went wrong is what one wants to read."""
    failed = [answer for answer in answers if not answer.detail.get("passed", True)]
    st.markdown(
        f"**{_('Answers')}** · " + _("{failed} of {total} failed").format(failed=len(failed), total=len(answers))
    )
    only = st.segmented_control(
        _("Show"),
        ["all", "failed", "identity", "general"],
        format_func=lambda value: {
            "all": _("all, failures first"),
            "failed": _("failures"),
            "identity": _("about itself"),
            "general": _("general"),
        }[value],
        default="all",
        required=True,
        key="score.filter",
        label_visibility="collapsed",
    )
    shown = [
        answer for answer in answers if only == "all" or answer.kind == only or (only == "failed" and answer in failed)
    ]
    shown.sort(key=lambda answer: (bool(answer.detail.get("passed", True)), answer.kind != "identity", answer.probe))
    if not shown:
        st.caption(_("None."))
        return
    st.dataframe(
        [_answer_row(answer) for answer in shown],
        hide_index=True,
        row_height=ROW_HEIGHT,
        height=min(520, 42 + ROW_HEIGHT * len(shown)),
        key="score.answers",
        column_config={
            "mark": st.column_config.TextColumn(_("Mark"), width=75),
            "kind": st.column_config.TextColumn(_("About"), width=75),
            "question": st.column_config.TextColumn(_("Question"), width=200),
            "base": st.column_config.TextColumn(_("Base answered"), width=360),
            "tuned": st.column_config.TextColumn(_("Tuned answers"), width=360),
        },
        alt=_("Answers of base and tuned model, failures first"),
    )


def _answer_row(answer: Answer) -> dict[str, str]:
    passed = answer.detail.get("passed", True)
    about = _("itself") if answer.kind == "identity" else _("the world")
    return {
        "mark": _("passed") if passed else _("failed"),
        "kind": about,
        "question": answer.prompt,
        "base": answer.base_answer,
        "tuned": answer.answer,
    }


def _take_along(evaluation: Evaluation, answers: Sequence[Answer]) -> None:
    """The scorecard as a file; made when it is asked for."""
    name = slugify(f"{evaluation.subject} {evaluation.weights_hash[:8]}")
    with st.container(horizontal=True):
        st.download_button(
            _("Download as one HTML page"),
            lambda: report.as_html(evaluation, answers),
            f"{name}.html",
            "text/html",
            icon=":material/download:",
            on_click="ignore",
            key="score.html",
        )
        st.download_button(
            _("Download as Markdown"),
            lambda: report.as_markdown(evaluation, answers),
            f"{name}.md",
            "text/markdown",
            icon=":material/download:",
            on_click="ignore",
            key="score.markdown",
        )
    st.caption(
        _("Weights {hash} · base {base} · questions from {dataset} · {when}").format(
            hash=plain(evaluation.weights_hash[:16]),
            base=plain(evaluation.base),
            dataset=plain(evaluation.dataset),
            when=plain(ago(evaluation.created_at)),
        )
    )
