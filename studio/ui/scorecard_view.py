"""The scorecard: run an evaluation, read the verdict, see where it failed, take it along as one page."""

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from studio import charts, report, scores
from studio.overfit import overfitting
from studio.paths import slugify
from studio.projects import Project
from studio.scores import ScoreLine
from studio.store import evaluations, open_db
from studio.store.evaluations import Answer, Evaluation
from studio.ui import state
from studio.ui.i18n import N_, _
from studio.ui.score_answers import answer_table
from studio.ui.score_start import score_panel
from studio.ui.suite_view import suite_view
from studio.ui.told import told
from studio.ui.verdict import signed, verdict
from studio.ui.widgets import ago, plain

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
    """Score checkpoints, then read the scorecards there are."""
    score_panel(project)
    suite_view(project)
    with open_db(project.folder) as db:
        found = evaluations.listed(db)
    if not found:
        st.info(_("No scorecard yet. Scoring asks base and checkpoint questions that were never trained on."))
        return
    chosen = _choose(found)
    with open_db(project.folder) as db:
        answers = evaluations.answers(db, chosen.id)
    if chosen.is_standard:
        _verdict(chosen)
    _tiles(chosen)
    if chosen.is_standard:
        _bars(chosen)
    _differences(chosen)
    _by_checkpoint(found, chosen)
    answer_table(answers)
    _take_along(chosen, answers)


def _choose(found: Sequence[Evaluation]) -> Evaluation:
    """The scorecard to read. One that has just been made is chosen by itself."""
    by_id = {each.id: each for each in found}
    if state.kept("score.newest") != found[0].id or st.session_state.get("score.evaluation") not in by_id:
        state.keep("score.newest", found[0].id)
        st.session_state["score.evaluation"] = found[0].id
    chosen = st.selectbox(
        _("Scorecard"),
        list(by_id),
        format_func=lambda id: _named(by_id[id]),
        key="score.evaluation",
    )
    return by_id[chosen]


def _named(evaluation: Evaluation) -> str:
    parts = [evaluation.subject, evaluation.suite, evaluation.weights_hash[:8], ago(evaluation.created_at)]
    return " · ".join(filter(None, parts))


def _verdict(evaluation: Evaluation) -> None:
    good, words = verdict(evaluation.scores)
    if overfitting(evaluation.scores).verdict == "overfitted":
        show, icon = st.error, ":material/dangerous:"
    else:
        show, icon = (st.success, ":material/task_alt:") if good else (st.warning, ":material/warning:")
    show(f"**{plain(evaluation.subject)}**: " + " ".join(words), icon=icon)
    if changed := evaluation.scores.get("setting", {}).get("changed_datasets"):
        said = _("{datasets} changed since this run was trained: it may be asked for another identity than it learnt.")
        st.warning(said.format(datasets=plain(", ".join(changed))), icon=":material/warning:")


def _tiles(evaluation: Evaluation) -> None:
    lines = [line for line in scores.lines(evaluation.scores) if evaluation.is_standard or line.tuned]
    if not lines:
        return
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
            if not line.sure:
                word = _("{word}; with so few questions that may be chance").format(word=word)
            icon = ":material/check:" if line.met else ":material/close:"
            st.caption(f"{icon} {word} ({sign} {_number(line, line.target)})")


def _value(line: ScoreLine, triple: tuple[float, float, float] | None) -> str:
    return "–" if triple is None else _number(line, triple[0])


def _with_interval(line: ScoreLine) -> str:
    """'93.1 % (85 to 97)'."""
    if line.tuned is None:
        return "–"
    low, high = (f"{100 * each:.0f}" for each in line.tuned[1:])
    value = _number(line, line.tuned[0]).removesuffix(" %")
    return _("{value} % ({low} to {high})").format(value=value, low=low, high=high)


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


def _differences(evaluation: Evaluation) -> None:
    """Group by group what can be said of the difference, and how far its predictions are from the base's."""
    groups = evaluation.scores.get("groups") or {}
    if groups:
        st.dataframe(
            [_group_row(*pair) for pair in groups.items()],
            hide_index=True,
            key="score.groups",
            column_config={
                "group": st.column_config.TextColumn(_("Group"), width=170),
                "base": st.column_config.TextColumn(_("Base passes"), width=170),
                "tuned": st.column_config.TextColumn(_("Tuned passes"), width=170),
                "words": st.column_config.TextColumn(
                    _("Difference"), width=420,
                    help=_("Pairs are compared: McNemar's exact test and Newcombe's interval must both see it (95 %)."),
                ),
            },
            alt=_("Base beside tuned, group by group"),
        )  # fmt: skip
    notes = [_divergence_words(evaluation), _format_words(evaluation)]
    if said := " · ".join(filter(None, notes)):
        st.caption(said)


def _group_row(name: str, sides: Mapping[str, Any]) -> dict[str, str]:
    base, tuned = (_counted(sides[side]) for side in ("base", "tuned"))
    return {"group": name, "base": base, "tuned": tuned, "words": told(scores.in_words(sides["difference"]))}


def _counted(counted: Mapping[str, Any]) -> str:
    share = f"{100 * counted['rate']:.0f} % ({100 * counted['low']:.0f}–{100 * counted['high']:.0f})"
    return f"{counted['hits']} / {counted['total']} · {share}"


def _divergence_words(evaluation: Evaluation) -> str:
    found = evaluation.scores.get("divergence") or {}
    if found.get("value") is None:
        return ""
    text = _("Apart from the base's predictions: {value} nats a token (95 %: {low} to {high})")
    return text.format(**{name: f"{found[name]:.3g}" for name in ("value", "low", "high")})


def _format_words(evaluation: Evaluation) -> str:
    """Endings and loops of all answers, whatever was asked."""
    ends, loops = evaluation.scores.get("ends"), evaluation.scores.get("loops")
    if not ends or not loops:
        return ""
    text = _("Answers that end by themselves: {ends} of {total} (base {base}), that loop: {loops} (base {b})")
    return text.format(
        ends=ends["tuned"]["hits"], total=ends["tuned"]["total"], base=ends["base"]["hits"],
        loops=loops["tuned"]["hits"], b=loops["base"]["hits"],
    )  # fmt: skip


def _by_checkpoint(found: Sequence[Evaluation], chosen: Evaluation) -> None:
    """The newest scorecard of each checkpoint of the same run by the same suite, when there are several."""
    same = [each for each in found if (each.run_id, each.suite) == (chosen.run_id, chosen.suite) and each.step]
    newest = {each.step: each for each in reversed(same)}
    if len(newest) < 2:
        return
    st.markdown(f"**{_('All checkpoints of this run')}**")
    st.dataframe(
        [_checkpoint_row(newest[step]) for step in sorted(newest)],
        hide_index=True,
        key="score.checkpoints",
        column_config={
            "step": st.column_config.NumberColumn(_("Step"), width=60),
            **{name: st.column_config.TextColumn(_(NAMES[name]), help=_(HELP[name])) for name in NAMES},
            "passed": st.column_config.TextColumn(_("Probes passed")),
            "words": st.column_config.TextColumn(_("Against the base"), width=330),
        },
        alt=_("Scores of all checkpoints"),
    )


def _checkpoint_row(evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {"step": evaluation.step}
    row |= {line.name: _with_interval(line) for line in scores.lines(evaluation.scores)}
    if passed := evaluation.scores.get("all"):
        row |= {"passed": _counted(passed["tuned"]) if passed["tuned"]["total"] else "–"}
        row |= {"words": told(scores.in_words(passed["difference"]))}
    return row


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
            dataset=plain(evaluation.dataset or evaluation.suite),
            when=plain(ago(evaluation.created_at)),
        )
    )
