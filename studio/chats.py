"""Conversations with base and tuned weights side by side, kept by project: begin, ask, branch, find again, vote."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

from studio.errors import StudioError
from studio.projects import Project
from studio.store import chats as store
from studio.store import open_db
from studio.store.chats import Chat, Choice, Reply, Turn, Vote
from studio.store.records import now

__all__ = ["Chat", "Choice", "Reply", "Turn", "Vote"]

TITLE_LENGTH = 60
Messages = list[dict[str, str]]


@dataclass
class Told:
    """A turn as it is read: with its replies by model, its vote, and the turns that branch off at the same place."""

    turn: Turn
    replies: dict[str, Reply] = field(default_factory=dict)
    vote: Vote | None = None
    branches: list[str] = field(default_factory=list)

    @property
    def hidden(self) -> bool:
        """Whether nobody may know yet which column is which."""
        return bool(self.turn.blind) and self.vote is None

    def head(self, model: str, labels: Mapping[str, str]) -> str:
        """What a column is called in this turn: a letter while it is hidden."""
        name = labels.get(model, model)
        if not self.turn.blind or model not in self.turn.models:
            return name
        letter = ascii_uppercase[self.turn.models.index(model)]
        return letter if self.hidden else f"{letter} · {name}"

    @property
    def place(self) -> int:
        """Which of the branches this one is, from 1."""
        return self.branches.index(self.turn.id) + 1


def begin(project: Project, base: str, labels: Mapping[str, str], title: str) -> Chat:
    """A new conversation of these columns: what each is called, by its model's name on the server."""
    with open_db(project.folder) as db:
        return store.add(db, Chat(titled(title), base, dict(labels)))


def titled(text: str) -> str:
    """A title of one line and reasonable length. Raises StudioError when nothing is left."""
    line = " ".join(text.split())
    if not line:
        raise StudioError("A conversation needs a title.", "Write some words.")
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def get(project: Project, chat_id: str) -> Chat:
    """Raises StudioError when there is none."""
    with open_db(project.folder) as db:
        return store.get(db, chat_id)


def listed(project: Project, words: str = "") -> list[Chat]:
    """All conversations, or those in which `words` stand; the one asked last comes first."""
    with open_db(project.folder) as db:
        return store.listed(db, words.strip())


def rename(project: Project, chat_id: str, title: str) -> None:
    with open_db(project.folder) as db:
        store.update(db, chat_id, title=titled(title))


def delete(project: Project, chat_id: str) -> None:
    """Delete a conversation with all its branches; votes on it still count."""
    with open_db(project.folder) as db:
        store.remove(db, store.get(db, chat_id).id)


def ask(project: Project, chat: Chat, parent: str, question: str, system: str = "", blind: bool = False) -> Turn:
    """Note a question after the turn `parent` ("" for a first one), in a branch of its own where there is one already.

    Blind columns are shuffled, and stay in their places until there was a vote.
    """
    with open_db(project.folder) as db:
        turns = {turn.id: turn for turn in store.turns(db, chat.id)}
        before = turns.get(parent)
        still_hidden = before is not None and before.blind and parent not in store.votes(db, chat.id)
        models = list(before.models) if before and still_hidden else list(chat.labels)
        if blind and not still_hidden:
            random.SystemRandom().shuffle(models)
        return store.add_turn(db, Turn(chat.id, parent, question, system, models, int(blind)))


def finish(project: Project, replies: Mapping[str, Reply]) -> None:
    """Keep what the columns replied."""
    with open_db(project.folder) as db:
        store.put_replies(db, replies.values())


def before(project: Project, turn: Turn) -> list[Told]:
    """The turns that led to this one, whichever branch is open."""
    return read(project, turn.chat_id, turn.parent) if turn.parent else []


def read(project: Project, chat_id: str, leaf: str = "") -> list[Told]:
    """A branch of a conversation, from its first turn to `leaf`; the branch that is open by default."""
    every = {told.turn.id: told for told in every_turn(project, chat_id)}
    turn_id, path = leaf or get(project, chat_id).leaf, []
    while turn_id in every:
        path.append(every[turn_id])
        turn_id = every[turn_id].turn.parent
    return path[::-1]


def every_turn(project: Project, chat_id: str) -> list[Told]:
    """The turns of all branches, oldest first."""
    with open_db(project.folder) as db:
        turns = store.turns(db, store.get(db, chat_id).id)
        replies, votes = store.replies(db, chat_id), store.votes(db, chat_id)
    by_parent = _by_parent(turns)
    return [
        Told(turn, replies.get(turn.id, {}), votes.get(turn.id), [each.id for each in by_parent[turn.parent]])
        for turn in turns
    ]


def open_branch(project: Project, chat_id: str, turn_id: str) -> None:
    """Read on from this turn to the newest end of its branch."""
    with open_db(project.folder) as db:
        by_parent = _by_parent(store.turns(db, chat_id))
        leaf = turn_id
        while followers := by_parent.get(leaf):
            leaf = followers[-1].id
        store.update(db, chat_id, leaf=leaf)


def vote(project: Project, turn: Turn, choice: Choice, model: str = "") -> Vote:
    """What is better in a blind turn; it is not blind any more. Raises StudioError for a model that it did not ask."""
    if (choice == "better") != (model in turn.models):
        raise StudioError(f"{model!r} cannot be voted for here.", f"Allowed: {', '.join(turn.models)}.")
    with open_db(project.folder) as db:
        return store.put_vote(db, Vote(turn.id, turn.chat_id, choice, model, list(turn.models), now()))


def votes(project: Project) -> list[Vote]:
    """Every vote of the project, oldest first."""
    with open_db(project.folder) as db:
        return list(store.votes(db).values())


def messages(told: Sequence[Told], model: str, system: str, question: str) -> Messages:
    """What a column continues: its own replies of the turns before, then the question."""
    chat = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for each in told:
        reply = each.replies.get(model)
        if reply and reply.text:
            chat += [
                {"role": "user", "content": each.turn.question},
                {"role": "assistant", "content": reply.text},
            ]
    return [*chat, {"role": "user", "content": question}]


def _by_parent(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.parent, []).append(turn)
    return found
