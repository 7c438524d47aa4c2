"""Chats with several columns: their turns as a tree, what each column replied, and votes on that."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlite_utils import Database

from studio.errors import StudioError
from studio.store.records import new_id, now, select, to_row, writing

Choice = Literal["better", "both_good", "both_bad"]


@dataclass
class Reply:
    """What one column has said. `ended_by` is "" while it speaks, then stop, length, stopped or error.

    `proof` says what made it: hashes of base, weights, template and prompt, adapter on or off, sampling.
    """

    turn_id: str
    model: str
    text: str = ""
    ended_by: str = ""
    error: str = ""
    proof: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0


@dataclass
class Turn:
    """A question to all columns. `parent` is the turn before it, "" for a first one; several turns with one parent are
    branches. `models` is the order in which the columns are shown; `blind`: without their names until a vote."""

    chat_id: str
    parent: str
    question: str
    system: str
    models: list[str]
    blind: int = 0
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)


@dataclass
class Chat:
    """A conversation with base and tuned weights. `labels` names each column's model; `leaf` is the last turn of the
    branch that is open."""

    title: str
    base: str
    labels: dict[str, str]
    leaf: str = ""
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)


@dataclass
class Vote:
    """How the replies of a blind turn compare: one (`model`) is better than all others, or none is."""

    turn_id: str
    chat_id: str
    choice: Choice
    model: str
    models: list[str]
    created_at: str = field(default_factory=now)


def add(db: Database, chat: Chat) -> Chat:
    db.table("chats").insert(to_row(chat))
    return chat


def get(db: Database, chat_id: str) -> Chat:
    found = select(db, Chat, "select * from chats where id = ?", [chat_id])
    if not found:
        raise StudioError(f"There is no conversation {chat_id!r}.", "`retune conversations list` shows what there is.")
    return found[0]


def listed(db: Database, words: str = "") -> list[Chat]:
    """All chats, or those whose title, questions or replies hold `words`; the one asked last comes first."""
    like = "%" + words.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    return select(
        db,
        Chat,
        "select * from chats where title like :like escape '\\' or id in ("
        "select chat_id from turns left join replies on replies.turn_id = turns.id"
        " where question like :like escape '\\' or text like :like escape '\\')"
        " order by updated_at desc, id desc",
        {"like": like},
    )


def update(db: Database, chat_id: str, **values: Any) -> None:
    """Change columns of a chat, as they are called in the table."""
    get(db, chat_id)
    db.table("chats").update(chat_id, values)


def remove(db: Database, chat_id: str) -> None:
    """Delete a chat with all its turns and replies. Votes stay: what people preferred is not unsaid."""
    with writing(db):
        db.execute("delete from replies where turn_id in (select id from turns where chat_id = ?)", [chat_id])
        db.execute("delete from turns where chat_id = ?", [chat_id])
        db.execute("delete from chats where id = ?", [chat_id])


def add_turn(db: Database, turn: Turn) -> Turn:
    """The new turn becomes the end of the branch that is open."""
    with writing(db):
        db.table("turns").insert(to_row(turn))
        update(db, turn.chat_id, leaf=turn.id, updated_at=turn.created_at)
    return turn


def turns(db: Database, chat_id: str) -> list[Turn]:
    """Every turn of a chat, of all branches, oldest first."""
    return select(db, Turn, "select * from turns where chat_id = ? order by created_at, id", [chat_id])


def put_replies(db: Database, replies: Iterable[Reply]) -> None:
    with writing(db):
        db.table("replies").upsert_all([to_row(reply) for reply in replies], pk=("turn_id", "model"))


def replies(db: Database, chat_id: str) -> dict[str, dict[str, Reply]]:
    """By turn and model."""
    found: dict[str, dict[str, Reply]] = {}
    rows = select(
        db, Reply, "select replies.* from replies join turns on turns.id = turn_id where chat_id = ?", [chat_id]
    )
    for reply in rows:
        found.setdefault(reply.turn_id, {})[reply.model] = reply
    return found


def put_vote(db: Database, vote: Vote) -> Vote:
    db.table("votes").upsert(to_row(vote), pk="turn_id")
    return vote


def votes(db: Database, chat_id: str = "") -> Mapping[str, Vote]:
    """Votes by turn, oldest first; those of one chat, or all."""
    rows = select(db, Vote, "select * from votes where ? in ('', chat_id) order by created_at", [chat_id])
    return {vote.turn_id: vote for vote in rows}
