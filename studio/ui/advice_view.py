"""Which checkpoint to take: identity against what it cost, with intervals, the front, and the reason in a sentence."""

from collections.abc import Callable, Mapping

import streamlit as st

from studio import charts, recommend
from studio.probes.paired import Interval
from studio.recommend import Candidate, Recommendation, RunVerdict
from studio.ui.i18n import _, ngettext
from studio.ui.told import told
from studio.ui.widgets import plain


def advice_view(advice: Recommendation, colors: Mapping[str, str]) -> None:
    """The sentence, what is overfitted, and the checkpoints in two planes."""
    if not advice.candidates:
        st.info(
            _("No checkpoint of these runs is scored yet. The tab Scorecard does it; then one is recommended here.")
        )
        return
    _sentence(advice)
    _overfitted(advice)
    _left_out(advice)
    left, right = st.columns(2)
    with left:
        _plane(advice, colors, lambda each: each.leakage, _("Leakage: says it unasked"), "leakage")
    with right:
        _plane(advice, colors, lambda each: each.growth, _("Growth of perplexity on what it knew"), "growth")
    st.caption(
        _(
            "Top left is best. Numbers are steps, lines 95 % intervals, ★ is recommended, ✕ overfitted. The dotted "
            "front joins those that no other beats in both."
        )
    )


def _sentence(advice: Recommendation) -> None:
    if advice.caveat:
        st.warning(plain(f"{told(advice.reason)} {told(advice.caveat)}"), icon=":material/recommend:")
    elif advice.chosen:
        st.success(plain(told(advice.reason)), icon=":material/recommend:")
    else:
        st.warning(plain(told(advice.reason)), icon=":material/warning:")


def _overfitted(advice: Recommendation) -> None:
    """Runs that ended so in red, with figures; that one was on its way in passing. The chart marks each checkpoint."""
    for run in advice.runs:
        if run.is_overfitted:
            _warn_of(run)
        elif run.spoilt:
            st.caption(plain(told(run.sentence)))


def _warn_of(run: RunVerdict) -> None:
    words = [f"**{plain(told(run.sentence))}**", *(plain(told(each)) for each in run.figures)]
    words += [plain(_("Identity: {value}.").format(value=percent(run.last.identity)))]
    st.error("  \n".join(words), icon=":material/dangerous:")


def _left_out(advice: Recommendation) -> None:
    if advice.left_out:
        text = ngettext(
            "{number} checkpoint was asked other questions and is left out. Score it with the same ones.",
            "{number} checkpoints were asked other questions and are left out. Score them with the same ones.",
            advice.left_out,
        )
        st.caption(text.format(number=advice.left_out))


def _plane(
    advice: Recommendation,
    colors: Mapping[str, str],
    cost: Callable[[Candidate], Interval | None],
    title: str,
    key: str,
) -> None:
    shown = [each for each in advice.candidates if each.identity and cost(each)]
    if not shown:
        return
    front = recommend.pareto(shown, lambda each: (cost(each) or (None,))[0])
    figure = charts.tradeoff_chart(
        [
            charts.spot(each, cost(each), each == advice.chosen, colors.get(each.run_id, charts.BLUE), _hint(each))
            for each in shown
        ],
        [((cost(each) or (0.0,))[0], (each.identity or (0.0,))[0]) for each in front],
        x_title=title,
        y_title=_("Identity"),
    )
    st.plotly_chart(figure, key=f"advice.{key}", theme="streamlit", config={"displayModeBar": False}, alt=title)


def _hint(each: Candidate) -> str:
    words = [
        each.run_id,
        _("step {step}").format(step=each.step),
        _("identity {value}").format(value=percent(each.identity)),
    ]
    return " · ".join(words)


def percent(interval: Interval | None) -> str:
    """'94.2 % (86.0 to 97.7)'."""
    if interval is None:
        return "–"
    value, low, high = (f"{100 * each:.1f}" for each in interval)
    return _("{value} % ({low} to {high})").format(value=value, low=low, high=high)
