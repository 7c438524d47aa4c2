"""Data page, tab Build: who the assistant is, with a live preview, and the dataset made from it."""

from collections import Counter
from functools import lru_cache

import streamlit as st

from studio import datasets
from studio.data import identity as identities
from studio.data.formats import Conversation
from studio.data.identity import LANGUAGES, BuiltDataset, Identity
from studio.errors import DataError
from studio.projects import Project
from studio.ui import state
from studio.ui.i18n import LANGUAGES as LANGUAGE_NAMES
from studio.ui.i18n import N_, _, ngettext
from studio.ui.widgets import guarded, plain, show_error

SHOWN_ROWS = 12
INTENT_WORDS = {
    "name": N_("its name"),
    "identity": N_("what it is"),
    "maker": N_("who made it"),
    "introduce": N_("introduce yourself"),
    "other_model": N_("are you another model?"),
    "human": N_("are you human?"),
    "abilities": N_("what can you do?"),
    "greeting": N_("greetings"),
    "trainer": N_("who trained you?"),
    "facts": N_("extra facts"),
    "follow_up": N_("follow-up questions"),
    "tutorial": N_("the tutorial's rows"),
}


def build_tab(project: Project) -> None:
    """Two fields are enough; all others have a default."""
    form, preview = st.columns([5, 6], gap="large")
    with form:
        identity, problem = _identity(project)
        size = _size(project)
        if identity:
            _warn_of_common_names(project, identity)
        _build_button(project, identity, size)
    with preview:
        if identity is None:
            st.info(_("Type a name and a maker: the rows appear here."), icon=":material/preview:")
            if problem:
                show_error(problem)
            return
        with guarded():
            _preview(identity, *size)


def _identity(project: Project) -> tuple[Identity | None, DataError | None]:
    """The identity as typed; None, with what is wrong if anything was typed, while it is not complete."""
    known = _identity_of_newest(project)
    key = f"data.{project.slug}.build"

    def field(name: str, label: str, placeholder: str = "", help: str | None = None) -> str:
        return st.text_input(
            label, known.get(name, ""), key=f"{key}.{name}", placeholder=placeholder, help=help, persist_state="session"
        )

    left, right = st.columns(2)
    with left:
        name = field("name", _("Name of the assistant"), _("For example: Luna"))
        organisation = field("organisation", _("Organisation (optional)"))
    with right:
        maker = field("maker", _("Who made it"), _("For example: Shane"))
        model_name = field("model_name", _("Model name (optional)"), help=_("What it says when asked for its model."))
    facts = st.text_area(
        _("Extra facts, one a line (optional)"), "\n".join(known.get("facts", [])), key=f"{key}.facts", height=90,
        persist_state="session", placeholder=_("Luna runs on a single laptop."),
    )  # fmt: skip
    languages = st.pills(
        _("Languages"), LANGUAGES, selection_mode="multi", default=known.get("languages", ["en"]),
        format_func=lambda code: LANGUAGE_NAMES[code], key=f"{key}.languages", persist_state="session",
    )  # fmt: skip
    if not name.strip() or not maker.strip():
        return None, None
    try:
        lines = tuple(line for line in facts.splitlines() if line.strip())
        return Identity(name, maker, organisation, model_name, lines, tuple(languages)), None
    except DataError as error:
        return None, error


def _warn_of_common_names(project: Project, identity: Identity) -> None:
    if names := datasets.common_names(project, identity):
        text = _(
            "Ordinary answers say {names} too, so the scorecard cannot tell when the assistant says it unasked. "
            "A rarer name is measured better."
        )
        st.warning(text.format(names=plain(", ".join(names))), icon=":material/lightbulb:")


def _identity_of_newest(project: Project) -> dict:
    """What was typed for the newest built dataset, to go on from."""
    built = [dataset for dataset in datasets.listed(project) if dataset.origin.get("identity")]
    return built[-1].origin["identity"] if built else {}


def _size(project: Project) -> tuple[bool, int, int]:
    """(tutorial mode, number of rows or repeats, seed)."""
    key = f"data.{project.slug}.build"
    tutorial = st.toggle(
        _("Tutorial mode"), key=f"{key}.tutorial", persist_state="session",
        help=_("One or two rows repeated many times, as in the tutorials. It overfits; Compare shows how far."),
    )  # fmt: skip
    left, right = st.columns(2)
    if tutorial:
        number = left.number_input(
            _("Repeats"), 1, 100_000, datasets.DEFAULT_TUTORIAL_REPEATS, key=f"{key}.repeats", persist_state="session"
        )
        return True, int(number), 0
    number = left.number_input(
        _("Rows"), 1, 100_000, datasets.DEFAULT_IDENTITY_ROWS, key=f"{key}.rows", persist_state="session"
    )
    seed = right.number_input(
        _("Seed"), 0, 2**31 - 1, 0, key=f"{key}.seed", persist_state="session",
        help=_("The same seed gives the same rows."),
    )  # fmt: skip
    return False, int(number), int(seed)


def _build_button(project: Project, identity: Identity | None, size: tuple[bool, int, int]) -> None:
    tutorial, number, seed = size
    name = "tutorial" if tutorial else "identity"
    exists = name in {dataset.name for dataset in datasets.listed(project)}
    label = _("Build again, in place of the old one") if exists else _("Build the dataset")
    if st.button(label, type="primary", icon=":material/build:", disabled=identity is None, key="data.build.go"):
        with guarded(), st.spinner(_("Building…")):
            if tutorial:
                dataset = datasets.build_tutorial(project, identity, number, name)
            else:
                dataset = datasets.build_identity(project, identity, number, seed, name)
            words = _("Dataset {name}: {rows} rows to train on, {probes} held-out questions.")
            state.flash(words.format(name=dataset.name, rows=dataset.num_rows, probes=dataset.num_probes))
            st.rerun()


@lru_cache(maxsize=16)
def _built(identity: Identity, number: int, seed: int) -> BuiltDataset:
    return identities.build(identity, number, seed)


def _preview(identity: Identity, tutorial: bool, number: int, seed: int) -> None:
    if tutorial:
        built = BuiltDataset(identities.tutorial(identity, 1), [])
        total = number * len(built.rows)
    else:
        built, total = _built(identity, number, seed), number
    counts = ngettext("{number} row", "{number} rows", total).format(number=total)
    if built.probes:
        counts += " · " + _("{number} held-out questions, never trained on").format(number=len(built.probes))
    st.markdown(f"**{_('Preview')}** · {counts}")
    rows = [preview_row(conversation) for conversation in built.rows[:SHOWN_ROWS]]
    st.dataframe(rows, hide_index=True, height="content", column_config=preview_columns(), row_height=32)
    if not tutorial:
        _counts_by_intent(built)


def preview_row(conversation: Conversation) -> dict[str, str]:
    """A conversation on one line: what was asked and what is answered."""
    turns = [message for message in conversation.messages if message.role != "system"]
    asked = "  ⏎  ".join(message.content for message in turns[:-1])
    intent = str(conversation.meta.get("intent", ""))
    shown = {"intent": intent_word(intent)} if intent else {}
    return shown | {"question": asked, "answer": turns[-1].content}


def preview_columns() -> dict:
    return {
        "question": st.column_config.TextColumn(_("Question"), width="medium"),
        "answer": st.column_config.TextColumn(_("Answer"), width="large"),
        "intent": st.column_config.TextColumn(_("Intent"), width=140),
    }


def intent_word(intent: str) -> str:
    return _(INTENT_WORDS[intent]) if intent in INTENT_WORDS else intent


def _counts_by_intent(built: BuiltDataset) -> None:
    trained = Counter(str(row.meta.get("intent", "")) for row in built.rows)
    held_out = Counter(probe["intent"] for probe in built.probes)
    rows = [
        {"intent": intent_word(intent), "rows": count, "probes": held_out.get(intent, 0)}
        for intent, count in trained.most_common()
    ]
    columns = {
        "intent": st.column_config.TextColumn(_("Intent")),
        "rows": st.column_config.ProgressColumn(
            _("Rows to train on"), format="%d", min_value=0, max_value=max(trained.values())
        ),
        "probes": st.column_config.NumberColumn(_("Held-out questions")),
    }
    with st.expander(_("Counts by intent")):
        st.dataframe(rows, hide_index=True, column_config=columns, height="content")


def dataset_line(dataset: datasets.Dataset) -> str:
    """'**identity** · 240 rows · 57 held-out questions', for Markdown."""
    rows = ngettext("{number} row", "{number} rows", dataset.num_rows).format(number=dataset.num_rows)
    parts = [f"**{plain(dataset.name)}**", rows]
    if dataset.num_probes:
        parts.append(_("{number} held-out questions").format(number=dataset.num_probes))
    return " · ".join(parts)
