"""Blind votes: under a turn whose columns are hidden, and all of them counted."""

from collections.abc import Mapping
from string import ascii_uppercase

import streamlit as st

from studio import chats, votes
from studio.chats import Told
from studio.projects import Project
from studio.ui import chat_state
from studio.ui.chat_keep import keep_better
from studio.ui.i18n import _
from studio.ui.widgets import guarded, plain
from studio.votes import FEWEST, Pair


def vote_row(project: Project, told: Told, labels: Mapping[str, str]) -> None:
    """Buttons while nobody knows which is which; what was voted afterwards."""
    if not told.turn.blind:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        if told.vote is None:
            _buttons(project, told)
        else:
            st.markdown(f":material/how_to_vote: {_verdict(told, labels)}", width="content")
            if not chat_state.demo_is_on():
                keep_better(project, told)


def _buttons(project: Project, told: Told) -> None:
    st.markdown(f"**{_('Which is better?')}**", width="content")
    answered = [model for model in told.turn.models if model in told.replies]
    for place, model in enumerate(told.turn.models):
        if model in answered:
            _button(project, told, ascii_uppercase[place], "better", model)
    several = len(answered) > 2
    _button(project, told, _("All good") if several else _("Both good"), "both_good")
    _button(project, told, _("All bad") if several else _("Both bad"), "both_bad")


def _button(project: Project, told: Told, label: str, choice: chats.Choice, model: str = "") -> None:
    st.button(
        label, key=f"compare.vote.{told.turn.id}.{choice}.{model}", type="primary" if model else "secondary",
        on_click=guarded()(chats.vote), args=(project, told.turn, choice, model),
    )  # fmt: skip


def _verdict(told: Told, labels: Mapping[str, str]) -> str:
    if told.vote and told.vote.choice == "better":
        return _("{name} is better").format(name=plain(told.head(told.vote.model, labels)))
    return _("Equally good") if told.vote and told.vote.choice == "both_good" else _("Equally bad")


def tally_view(project: Project) -> None:
    """Every pair of columns that was voted on, and what can be said of it."""
    labels = {model: label for chat in reversed(chats.listed(project)) for model, label in chat.labels.items()}
    pairs = votes.tally(chats.votes(project))
    if not pairs:
        st.caption(_("No vote yet. Switch on “Blind”, ask, and say which answer is better."))
    for pair in pairs:
        with st.container(border=True, gap="xsmall", width=420):
            _pair(pair, labels)
    if pairs:
        st.caption(_("Decide beforehand how many votes you will cast: stopping when it looks right proves nothing."))


def _pair(pair: Pair, labels: Mapping[str, str]) -> None:
    first, second = (plain(labels.get(name, name)) for name in (pair.first, pair.second))
    st.markdown(f"**{first}** – **{second}**")
    st.markdown(words_of(pair, first, second))
    st.caption(
        _("{first} better {wins} · {second} better {losses} · both good {good} · both bad {bad}").format(
            first=first, second=second, wins=pair.first_wins, losses=pair.second_wins, good=pair.both_good,
            bad=pair.both_bad,
        )
    )  # fmt: skip


def words_of(pair: Pair, first: str, second: str) -> str:
    """No more than the interval says; names are Markdown already."""
    low, high = pair.interval
    if not pair.decided:
        return _("No vote prefers one of them yet.")
    numbers = _("{first} in {wins} of {number} decided votes (95 %: {low}–{high} %)").format(
        first=first, wins=pair.first_wins, number=pair.decided, low=round(100 * low), high=round(100 * high)
    )
    if pair.preferred:
        name = first if pair.preferred == "first" else second
        return _("{name} is preferred: {numbers}.").format(name=name, numbers=numbers)
    if pair.decided < FEWEST:
        return _("Too few votes to tell: {numbers}.").format(numbers=numbers)
    return _("No preference can be told: {numbers}.").format(numbers=numbers)
