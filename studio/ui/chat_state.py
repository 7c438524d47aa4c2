"""What a browser session knows of its conversation on the Compare page: which is open, and who is answering."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import streamlit as st

from studio import chats
from studio.chat_client import Column, Connection, Sampling
from studio.chats import Chat, Told
from studio.projects import Project
from studio.ui import state
from studio.ui.exchange import Exchange

SETTINGS = {
    "compare.max_tokens": 96,
    "compare.temperature": 0.0,
    "compare.top_p": 1.0,
    "compare.seed": 0,
    "compare.system": "",
    "compare.own": False,
    "compare.blind": False,
}
SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def open_chat(project: Project) -> Chat | None:
    """The conversation that is open; None for none yet, or one that was deleted."""
    chat_id = state.kept("compare.chat", "")
    return next((chat for chat in chats.listed(project) if chat.id == chat_id), None) if chat_id else None


def open_it(chat: Chat) -> None:
    """Read a conversation; its columns are the ones to load."""
    leave()
    state.keep("compare.chat", chat.id)
    state.keep("compare.columns", list(chat.labels))
    state.keep("compare.shown", list(chat.labels))
    state.keep("compare.base", chat.base)
    if list(chat.labels) != state.kept("compare.wanted"):
        state.forget("compare.wanted")


def leave() -> None:
    """Begin anew; what was said is kept."""
    if exchange := exchange_now():
        exchange.stop()
    for name in ("compare.chat", "compare.exchange", "compare.columns"):
        state.forget(name)


def columns_of_chat() -> list[str] | None:
    """The columns of the conversation that is open."""
    return state.kept("compare.columns")


def exchange_now() -> Exchange | None:
    """The newest question of this session, answered or not."""
    return state.kept("compare.exchange")


def is_busy() -> bool:
    exchange = exchange_now()
    return bool(exchange and exchange.busy)


def demo_is_on() -> bool:
    """Whether the page is shown to a room."""
    return bool(state.kept("compare.demo", False))


def set_demo(on: bool) -> None:
    state.keep("compare.demo", on)


def hold_settings() -> None:
    """Widgets forget their values where they are not drawn; assigning them anew keeps them."""
    state.hold(["compare"])
    for key, default in SETTINGS.items():
        st.session_state[key] = st.session_state.get(key, default)


def setting(name: str) -> Any:
    """What the person set for the next question."""
    key = f"compare.{name}"
    return st.session_state.get(key, SETTINGS[key])


def sampling(more_seed: int = 0) -> Sampling:
    """How all columns answer. `more_seed` goes on the seed: the same question asked again gets another answer."""
    return Sampling(
        max_tokens=int(setting("max_tokens")),
        temperature=float(setting("temperature")),
        top_p=float(setting("top_p")),
        seed=int(setting("seed")) + more_seed,
    )


def own_key(model: str, name: str) -> str:
    """The widget in which a column's own setting stands."""
    return f"compare.own.{model}.{name}"


def own_sampling(model: str, more_seed: int = 0) -> Sampling | None:
    """How this column answers where each has its own settings; None where all answer alike."""
    if not setting("own"):
        return None
    same = sampling()
    values = {name: st.session_state.get(own_key(model, name), getattr(same, name)) for name in SAMPLING}
    own = replace(same, **values)
    return replace(own, seed=own.seed + more_seed)


def ask(
    project: Project,
    base: str,
    labels: Mapping[str, str],
    connection: Connection,
    told: Sequence[Told],
    question: str,
    more_seed: int = 0,
) -> None:
    """Put a question to every column, after the turns of `told`; beside what was asked there already, as a branch."""
    chat = open_chat(project) or chats.begin(project, base, labels, question)
    parent = told[-1].turn.id if told else ""
    turn = chats.ask(project, chat, parent, question, setting("system"), bool(setting("blind")))
    columns = [
        Column(model, chats.messages(told, model, turn.system, question), own_sampling(model, more_seed))
        for model in turn.models
        if model in labels
    ]
    state.keep("compare.chat", chat.id)
    state.keep("compare.columns", list(chat.labels))
    exchange = Exchange(connection, turn.id, columns, sampling(more_seed), partial(chats.finish, project))
    state.keep("compare.exchange", exchange.start())
