"""The answers of a scorecard, base beside tuned, failures first, by group."""

from collections.abc import Sequence

import streamlit as st

from studio.report import not_held
from studio.store.evaluations import Answer
from studio.ui.i18n import _

ROW_HEIGHT = 68


def answer_table(answers: Sequence[Answer]) -> None:
    """Failures first: what went wrong is what one wants to read."""
    failed = [answer for answer in answers if answer.failed]
    st.markdown(
        f"**{_('Answers')}** · " + _("{failed} of {total} failed").format(failed=len(failed), total=len(answers))
    )
    shown = _filtered(answers)
    shown.sort(key=lambda answer: (not answer.failed, answer.kind != "identity", answer.probe))
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
            "mark": st.column_config.TextColumn(_("Mark"), width=70),
            "group": st.column_config.TextColumn(_("Group"), width=95),
            "question": st.column_config.TextColumn(_("Question"), width=190),
            "base": st.column_config.TextColumn(_("Base answered"), width=265),
            "tuned": st.column_config.TextColumn(_("Tuned answers"), width=265),
            "why": st.column_config.TextColumn(_("Not held"), width=140),
        },
        alt=_("Answers of base and tuned model, failures first"),
    )


def _filtered(answers: Sequence[Answer]) -> list[Answer]:
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    words = {
        "all": _("all, failures first"),
        "failed": _("failures"),
        "gained": _("won against the base"),
        "lost": _("lost against the base"),
    }
    only = left.segmented_control(
        _("Show"), list(words), format_func=words.__getitem__, default="all", required=True, key="score.filter",
        label_visibility="collapsed",
    )  # fmt: skip
    groups = list(dict.fromkeys(answer.group for answer in answers))
    group = right.selectbox(
        _("Group"), ["", *groups], format_func=lambda name: _group_word(name) or _("all groups"), key="score.group",
        label_visibility="collapsed",
    )  # fmt: skip
    return [answer for answer in answers if _is_wanted(answer, only) and group in ("", answer.group)]


def _is_wanted(answer: Answer, only: str | None) -> bool:
    pair = (answer.base_passed, answer.passed) if answer.judged else ()
    wanted = {"failed": answer.failed, "gained": pair == (False, True), "lost": pair == (True, False)}
    return wanted.get(only or "all", True)


def _group_word(name: str) -> str:
    return {"identity": _("about itself"), "general": _("general")}.get(name, name)


def _answer_row(answer: Answer) -> dict[str, str]:
    word = _("failed") if answer.failed else _("passed")
    return {
        "mark": word if answer.judged else "–",
        "group": _group_word(answer.group),
        "question": answer.prompt,
        "base": answer.base_answer,
        "tuned": answer.answer,
        "why": not_held(answer),
    }
