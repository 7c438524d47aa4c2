"""The life of a row on one screen: in the file, as a conversation, as text, as tokens, and where it is trained."""

import json
from collections.abc import Sequence
from contextlib import suppress

import streamlit as st

from studio import datasets, models, row_life, row_place, runs
from studio.config.catalog import preset_names
from studio.config.schema import RunConfig
from studio.config.yaml import load_config, load_text
from studio.data.conversation import Conversation
from studio.data.named import template_names
from studio.data.row_index import RowIndex
from studio.data.rows import RawRow
from studio.datasets import Dataset
from studio.errors import StudioError
from studio.projects import Project
from studio.row_life import Chip
from studio.row_place import RowPlace
from studio.ui.i18n import N_, _, ngettext
from studio.ui.token_view import token_view
from studio.ui.widgets import plain, show_error

MAX_LENGTH = 512
SHOWN_CHARACTERS = 20_000
RAW_CHARACTERS, RAW_HEIGHT = 600, 240  # a longer raw row scrolls in its box
SHOWN_TOKENS = 10_000  # more elements than that make a browser slow
MESSAGE_CHARACTERS, MESSAGE_HEIGHT = 1_500, 320
MISSING_WORDS = {
    row_life.BUILT: N_("made by the studio, from no source"),
    row_life.EDITED: N_("changed since it was imported"),
    row_life.NOT_KEPT: N_("not kept: import the source again to see it"),
}
LARGE_ROWS = 50_000  # beyond it a row's place is looked for when it is asked for


def row_view(project: Project, dataset: Dataset, rows: RowIndex, numbers: Sequence[int]) -> None:
    """From the row in the file to the tokens that are trained."""
    first = numbers[0] if numbers else 1
    key = f"data.browse.row.{dataset.name}.{first}.{len(rows)}"
    number = int(
        st.number_input(
            _("The life of row"), 1, len(rows), first, key=key,
            help=_("What becomes of a row: conversation, text, tokens. The trainer uses the same functions."),
        )
    )  # fmt: skip
    row = rows.row(number)
    _raw(project, dataset, row)
    _conversation(row)
    if not models.resolve(project.base).present:
        st.info(_("The tokens appear when the base model {base} is on this machine.").format(base=plain(project.base)))
        return
    _tokens(project, dataset, row, number)
    _place(project, dataset, number)


def _raw(project: Project, dataset: Dataset, row: Conversation) -> None:
    """The row as its source has it; where no source has it, why, and how it is stored."""
    raw = row_life.raw_of(project, dataset, row)
    if not raw.rows:
        with st.expander(_("Raw row") + f" · {_(MISSING_WORDS[raw.missing])}", icon=":material/data_object:"):
            st.caption(_("The row as the studio stores it:"))
            st.code(_begin(json.dumps(row.to_row(), ensure_ascii=False, indent=2)), language="json", wrap_lines=True)
        return
    first = raw.rows[0]
    with st.expander(f"{_('Raw row')} · {plain(raw.source)}, {_raw_place(first)}", True, icon=":material/data_object:"):
        if raw.num_rows > 1:
            words = _("{number} rows of the source became this same row: {rows}")
            numbers = ", ".join(str(each.number) for each in raw.rows) + (", …" if raw.num_rows > len(raw.rows) else "")
            st.caption(words.format(number=f"{raw.num_rows:,}", rows=numbers))
        text = row_life.raw_text(first, _("… and {number} characters more"))
        st.code(
            _begin(text), language="json", wrap_lines=True, height=RAW_HEIGHT if len(text) > RAW_CHARACTERS else None
        )


def _raw_place(raw: RawRow) -> str:
    words = _("row {number}").format(number=raw.number)
    if raw.line not in (None, raw.number):
        words += f" ({_('line {number}').format(number=raw.line)})"
    return f"{plain(raw.file)}, {words}" if raw.file else words


def _conversation(row: Conversation) -> None:
    names = {"system": _("System"), "user": _("Question"), "assistant": _("Answer"), "tool": _("Tool")}
    if row.kind == "text":
        names["assistant"] = _("Text")
    for message in row.messages:
        _message(names.get(message.role, plain(message.role)), message.content, message.tool_calls)
    for rejected in row.meta.get("rejected", ()):
        name = _("Rejected: {role}").format(role=names.get(rejected.get("role"), plain(rejected.get("role"))))
        _message(name, str(rejected.get("content")))


def _message(name: str, content: str, tool_calls: str = "") -> None:
    height = MESSAGE_HEIGHT if len(content) > MESSAGE_CHARACTERS else "content"
    with st.container(border=True, gap="xsmall", height=height):
        st.caption(name)
        if content:
            st.text(_begin(content))
        if tool_calls:
            st.code(_begin(tool_calls), language="json", wrap_lines=True)


def _begin(text: str) -> str:
    """All of it, unless it would stop the browser."""
    left = len(text) - SHOWN_CHARACTERS
    return (
        text if left <= 0 else text[:SHOWN_CHARACTERS] + "\n" + _("… and {number} characters more").format(number=left)
    )


def _tokens(project: Project, dataset: Dataset, row: Conversation, number: int) -> None:
    left, right = st.columns(2)
    template = left.selectbox(
        _("Template"), ["", *template_names()], key="data.browse.template",
        format_func=lambda name: name or _("the model's own"),
    )  # fmt: skip
    longest = right.number_input(_("Longest, in tokens"), 16, 1_048_576, MAX_LENGTH, key="data.browse.longest")
    view = row_life.View(models.require(project.base), template, int(longest))
    try:
        life, shown = _life(dataset.fingerprint, number, view, row)
    except StudioError as error:
        show_error(error)
        return
    words = _("{all} tokens, {trained} of them trained").format(all=len(life.tokens), trained=life.num_trained_tokens)
    cut = f" :red-badge[{_('cut off')}]" if life.truncated else ""
    st.markdown(f"**{words}** · :green-badge[{_('trained')}] :gray-badge[{_('not trained')}]{cut}")
    token_view(shown[:SHOWN_TOKENS], key=f"data.browse.tokens.{dataset.name}")
    if len(shown) > SHOWN_TOKENS:
        st.caption(_("The first {number} are shown.").format(number=f"{SHOWN_TOKENS:,}"))
    if life.truncated:
        words = ngettext("{number} token is cut off.", "{number} tokens are cut off.", life.num_cut)
        st.warning(words.format(number=f"{life.num_cut:,}"))
    with st.expander(_("Rendered by the chat template"), icon=":material/subject:"):
        st.code(_begin(life.text), language=None, wrap_lines=True)


@st.cache_data(max_entries=64, show_spinner=False)
def _life(
    fingerprint: str, number: int, view: row_life.View, _row: Conversation
) -> tuple[row_life.RowLife, list[Chip]]:
    life = row_life.of_conversation(_row, number, view)
    return life, row_life.chips_of(life, view.model_folder)


def _place(project: Project, dataset: Dataset, number: int) -> None:
    """Where a run of a config trains this row."""
    with st.expander(_("Where it is trained"), icon=":material/view_week:"):
        configs = _configs_with(project, dataset.name)
        if not configs:
            st.caption(_("No config of this project trains on this dataset."))
            return
        name = st.selectbox(_("Config"), list(configs), key=f"data.browse.config.{dataset.name}")
        if dataset.num_rows > LARGE_ROWS and not st.checkbox(
            _("Look for it (all rows are tokenised, which takes a while)"), key=f"data.browse.place.{dataset.name}"
        ):
            return
        with st.spinner(_("Planning the steps…")):
            _tell_place(configs[name], row_place.place_of(project, configs[name], dataset.name, number))


def _configs_with(project: Project, dataset: str) -> dict[str, RunConfig]:
    """The project's configs, then the presets, that train on a dataset and have all their datasets, by name."""
    there = {each.name for each in datasets.listed(project)}
    found: dict[str, RunConfig] = {}
    for name in runs.list_configs(project):
        with suppress(StudioError):  # the Config page says what is wrong with it
            found[name] = load_config(runs.config_path(project, name))
    for name in preset_names():
        found.setdefault(name, load_text(runs.preset_text(project, name), name))
    return {
        name: each for name, each in found.items() if dataset in each.data.sources and there >= set(each.data.sources)
    }


def _tell_place(config: RunConfig, place: RowPlace) -> None:
    if place.use == row_place.LEFT_OUT:
        st.warning(_("It is left out: no token of it is trained within the longest length."))
        return
    if place.use == row_place.KEPT_OUT:
        st.info(_("It is kept out of training and measures how the model does on rows it has not seen."))
        return
    st.markdown(
        _("First trained in step {step}, line {line} of micro-batch {batch}, packed as `{pack}`.").format(
            step=place.step, line=place.line, batch=place.micro_batch, pack=config.data.pack
        )
    )
    if place.num_shared:
        words = _("Its first {number} tokens are the same as another row's of this line and are computed once.")
        st.caption(words.format(number=place.num_shared))
    st.dataframe(
        [
            {
                "this": "●" if index == place.own else "",
                "dataset": each.source,
                "row": each.row,
                "tokens": each.num_tokens,
            }
            for index, each in enumerate(place.neighbours)
        ],
        hide_index=True, height="content" if len(place.neighbours) < 9 else 320,
        column_config={
            "this": st.column_config.TextColumn("", width=30),
            "dataset": st.column_config.TextColumn(_("Dataset")),
            "row": st.column_config.NumberColumn(_("Row")),
            "tokens": st.column_config.ProgressColumn(
                _("Tokens"), format="%d", min_value=0, max_value=max(each.num_tokens for each in place.neighbours)
            ),
        },
    )  # fmt: skip
