"""`retune data inspect`: one row of a dataset or of any file, from the raw row to its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.cli import show
from studio.cli.lazy import files, row_life
from studio.cli.options import ColumnsOption, JsonOption, ProjectOption, base_model, chosen
from studio.errors import ProjectError
from studio.paths import typed_path

if TYPE_CHECKING:
    from studio.data.conversation import Conversation
    from studio.projects import Project
    from studio.row_life import RawPart, RowLife, View

IGNORED = -100
SHOWN_TOKENS = 4_000
MISSING = {
    "built": "none; the studio made this row.",
    "edited": "none; this row was changed since it was imported.",
    "not kept": "not kept; import the source again to see it.",
}


def inspect(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_DATASET", help="A file, or a dataset of the project.")],
    row: Annotated[int, typer.Option(min=1, help="The row, from 1.")] = 1,
    template: Annotated[
        str | None, typer.Option(help="A named template; none: no template; left out: the tokenizer's own.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json and tokenizer_config.json.")] = "",
    base: Annotated[str, typer.Option(help="Base model to take both from; the project's when left out.")] = "",
    format: Annotated[
        str, typer.Option(help="How a file's rows are read (retune data formats); recognised when left out.")
    ] = "",
    columns: ColumnsOption = "",
    sheet: Annotated[str, typer.Option(help="Sheet of a workbook; the first one when left out.")] = "",
    encoding: Annotated[str, typer.Option(help="Encoding of a text file; found out when left out.")] = "",
    max_length: Annotated[int, typer.Option(min=0, help="Longest sequence in tokens; 0 cuts nothing off.")] = 0,
    loss_on: Annotated[str, typer.Option(help="assistant, last or all.")] = "assistant",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Show one row's life: the raw row, conversation, tokens with the trained ones marked; --json has all of it.

    What has a dot or a slash is a file, and needs no project; anything else is a dataset.

    Example: retune data inspect chats.jsonl --row 3 --template qwen_chat
    """
    is_file = "." in source or "/" in source
    workspace = _project(project, needed=not is_file)
    folder = row_life.model_folder(tokenizer, base_model(base), workspace)
    view: View = row_life.View(folder, "none" if template == "" else template or "", max_length or None, loss_on)
    if is_file:
        options = files.ReadOptions(encoding, sheet)
        life = row_life.of_file(typed_path(source), row, view, format, options, columns)
    else:
        life = row_life.of_dataset(workspace, source, row, view)
    return show.as_json(_as_json(life)) if json else _print(life, folder)


def _project(name: str, needed: bool) -> Project | None:
    """A file needs no project, but the project's base model is looked at where there is one."""
    try:
        return chosen(name)
    except ProjectError:
        if needed or name:
            raise
        return None


def _print(life: RowLife, folder: Path) -> None:
    _print_raw(life.raw)
    if not life.conversation.messages:
        return show.say(f"Row {life.row}: the format leaves it out.")
    for role, said in _spoken(life.conversation):
        show.out.print(show.plain(f"{role}: {row_life.shortened_cells(said)}"), highlight=False)
    cut = f", {life.num_cut} more cut off at the longest length" if life.truncated else ""
    trained = f"{life.num_trained_tokens} are trained, marked [so]"
    show.say(f"\n{len(life.tokens)} tokens{cut}; {trained}; ⟦ ⟧ holds a control token:")
    kept = [each for each in row_life.chips_of(life, folder) if not each.cut]
    show.out.print(_marked(kept[:SHOWN_TOKENS]), highlight=False)
    if (left := len(kept) - SHOWN_TOKENS) > 0:
        show.say(f"… and {left:,} more; --json has all of them.")
    return None


def _spoken(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Who says what: calls of tools too, and after the messages of a preference pair the rejected ones."""
    for message in conversation.messages:
        role = "text" if conversation.kind == "text" else message.role
        if message.content or not message.tool_calls:
            yield role, message.content
        if message.tool_calls:
            yield f"{role} calls", message.tool_calls
    for rejected in conversation.meta.get("rejected", ()):
        yield f"rejected {rejected.get('role')}", str(rejected.get("content"))


def _print_raw(raw: RawPart) -> None:
    """As the source has it, long cells cut."""
    if raw.missing:
        show.say(f"Raw row: {MISSING[raw.missing]}\n")
    for row in raw.rows[:1]:
        more = f" and {raw.num_rows - 1:,} equal ones" if raw.num_rows > 1 else ""
        show.say(f"Raw row: {raw.source}, {row_life.place(row)}{more}\n{row_life.raw_text(row)}\n")


def _marked(tokens: list[Any]) -> Any:
    """The row's text with trained stretches in brackets and green, control tokens in ⟦ ⟧: colours are not needed."""
    text = show.plain("")
    for before, token in zip([None, *tokens[:-1]], tokens, strict=True):
        if token.trained and not (before and before.trained):
            text.append("[", "green")
        if before and before.trained and not token.trained:
            text.append("]", "green")
        said = show.plain(token.text).plain
        text.append(f"⟦{said}⟧" if token.control else said, "green" if token.trained else "bright_black")
    return text.append("]", "green") if tokens and tokens[-1].trained else text


def _as_json(life: RowLife) -> dict[str, Any]:
    """`raw` is null where no source has the row (`raw_missing` says why). `text` is what `input_ids` decode to;
    `rendered` is what the template wrote, with nothing cut off."""
    raw = life.raw
    return {
        "raw": raw.rows[0].value if raw.rows else None,
        "raw_source": raw.source,
        "raw_places": [{"file": row.file, "row": row.number, "line": row.line} for row in raw.rows],
        "raw_missing": raw.missing,
        "conversation": life.conversation.to_row() if life.turns is None else life.turns,
        "text": life.kept_text,
        "input_ids": [token.id for token in life.tokens],
        "labels": [token.id if token.trained else IGNORED for token in life.tokens],
        "tokens": life.tokens,
        "rendered": life.text,
        "truncated": life.truncated,
    }
