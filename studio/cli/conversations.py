"""`retune conversations`: what was asked on the Compare page, to list, read, export, and the votes on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import chat_export, chats, votes
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import StudioError
from studio.paths import atomic_write_text

if TYPE_CHECKING:
    from studio.chats import Chat
    from studio.projects import Project
    from studio.votes import Pair

app = group("Conversations with base and tuned weights side by side.")
NEWEST = "newest"
ENDINGS = {".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".json": "json"}
WhichArgument = Annotated[str, typer.Argument(help="Its id, or the beginning of it; the newest when left out.")]


@app.command("list")
def list_(
    words: Annotated[str, typer.Argument(help="Only those in which these words stand.")] = "",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """List conversations, the one asked last first.

    Example: retune conversations list "capital of France"
    """
    found = chats.listed(chosen(project), words)
    if json:
        return show.as_json(found)
    if not found:
        return show.say("Nothing was found." if words else "No conversation yet. Ask something on the Compare page.")
    rows = [(chat.id, chat.title, ", ".join(chat.labels), chat.updated_at[:16]) for chat in found]
    return show.table(["conversation", "title", "columns", "asked"], rows)


@app.command("show")
def show_(conversation: WhichArgument = NEWEST, json: JsonOption = False, project: ProjectOption = "") -> None:
    """Print a conversation; with --json everything that is stored, of all branches.

    Example: retune conversations show
    """
    where = chosen(project)
    chat = _find(where, conversation)
    if json:
        return print(chat_export.exported(where, chat.id, "json"), end="")
    show.say(f"{chat.title}\nBase {chat.base}, {chat.created_at[:16]}")
    for told in chats.read(where, chat.id):
        show.say(f"\n> {told.turn.question}")
        for model in told.turn.models:
            if model in told.replies:
                show.say(f"\n{told.head(model, chat.labels)}\n{told.replies[model].text or told.replies[model].error}")
    return None


@app.command()
def export(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONVERSATION] FILE",
            help="The file to write: .html for one page, .md, or .json with all branches. Before it the conversation's "
            "id, or the beginning of it; the newest when left out.",
        ),
    ],
    conversation: Annotated[str, typer.Option(help="The same as CONVERSATION.")] = NEWEST,
    project: ProjectOption = "",
) -> None:
    """Write a conversation to a file that opens anywhere.

    Example: retune conversations export before-and-after.html
    """
    *named, last = words
    if len(named) > 1:
        raise StudioError(f"Too much is named: {' '.join(words)}.", "Give one conversation, or none, and one file.")
    file, conversation = Path(last), named[0] if named else conversation
    kind = ENDINGS.get(file.suffix.lower())
    if kind is None:
        raise StudioError(f"{file.name!r} says no format.", "Allowed endings: .html, .md, .json.")
    where = chosen(project)
    atomic_write_text(file.resolve(), chat_export.exported(where, _find(where, conversation).id, kind))
    show.say(f"Wrote {file}")


@app.command()
def delete(
    conversation: Annotated[str, typer.Argument(help="Its id, or the beginning of it.")], project: ProjectOption = ""
) -> None:
    """Delete a conversation with all its branches. Votes on it still count.

    Example: retune conversations delete 20261125T22
    """
    where = chosen(project)
    chat = _find(where, conversation)
    chats.delete(where, chat.id)
    show.say(f"Deleted {chat.title}")


@app.command("votes")
def votes_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """Count the blind votes, pair by pair, with 95 % intervals.

    Example: retune conversations votes
    """
    pairs = votes.tally(chats.votes(chosen(project)))
    if json:
        return show.as_json(pairs)
    if not pairs:
        return show.say("No vote yet. Switch on Blind on the Compare page, ask, and vote.")
    return show.table(
        ["first", "second", "first better", "second better", "both good", "both bad", "first preferred"],
        [
            (p.first, p.second, p.first_wins, p.second_wins, p.both_good, p.both_bad, _interval(p))
            for p in pairs
        ],
    )  # fmt: skip


def _interval(pair: Pair) -> str:
    """The share of decided votes, and whether it tells anything."""
    if not pair.decided:
        return "-"
    low, high = pair.interval
    share = f"{pair.first_wins / pair.decided:.0%} ({low:.0%} to {high:.0%})"
    return share if pair.preferred else f"{share}, which tells no preference"


def _find(project: Project, wanted: str) -> Chat:
    """The newest, or the one whose id begins so. Raises StudioError."""
    found = [chat for chat in chats.listed(project) if wanted == NEWEST or chat.id.startswith(wanted)]
    if not found or (wanted != NEWEST and len(found) > 1):
        what = "There is no conversation" if not found else "There are several conversations"
        raise StudioError(f"{what} {wanted!r}.", "`retune conversations list` shows what there is.")
    return found[0]
