"""Probe suites on the page: look at one, copy a built-in one, edit as YAML, add a probe, import, delete."""

from collections.abc import Sequence

import streamlit as st

from studio import runs, suites
from studio.errors import DataError, StudioError
from studio.probes import built_in
from studio.probes.assertions import KINDS, Assertion, shown_value
from studio.probes.reading import parse_suite
from studio.probes.suite import Probe, Suite
from studio.projects import Project
from studio.ui import state
from studio.ui.i18n import _
from studio.ui.score_start import suite_word
from studio.ui.widgets import guarded, plain, show_error

EMPTY = """description: ""
max_new_tokens: 64
groups:
  - name: first
    probes:
      - ask: When do you open?
        assert:
          - {type: icontains, value: nine}
"""
TEXT_HEIGHT, TABLE_HEIGHT = 340, 300
SIMPLE_KINDS = [kind for kind in KINDS if kind not in ("is-json", "contains-json")]
LISTS = [kind for kind in KINDS if kind.endswith(("-any", "-all"))]


def suite_view(project: Project) -> None:
    """Everything that is done with suites, folded away until it is wanted."""
    with st.expander(_("Suites: what is asked, and what an answer must hold"), icon=":material/checklist:"):
        _notice()
        name = st.selectbox(_("Suite to look at"), suites.names(project), format_func=suite_word, key="suite.shown")
        with guarded():
            if name in built_in.NAMES:
                _built_in(project, name)
            else:
                _own(project, name)
        _more(project)


def _built_in(project: Project, name: str) -> None:
    found = runs.list_runs(project)
    if not found:
        st.caption(_("Built-in suites ask a run about its own identity; there is no run yet."))
        return
    try:
        suite = runs.suite_for(project, found[0].id, name)
    except DataError:
        st.caption(_("There are no held-out questions for this run. The Data page makes them with a general set."))
        return
    st.caption(_("As {run} is asked it.").format(run=plain(found[0].id)))
    _preview(suite.probes())
    left, right = st.columns([4, 1.4], vertical_alignment="bottom")
    copy = left.text_input(_("Name of the copy"), f"my-{name}", key=f"suite.copy.{name}")
    if right.button(_("Copy to edit"), key="suite.copy", icon=":material/content_copy:", width="stretch"):
        suites.copy_built_in(project, suite, copy)
        _go_to(copy, _("Copied to {name}."))


def _own(project: Project, name: str) -> None:
    text = st.text_area(
        _("The suite as YAML"), suites.text_of(project, name), height=TEXT_HEIGHT, key=f"suite.text.{name}"
    )
    suite = _checked(text, name)
    with st.container(horizontal=True):
        unchanged = text == suites.text_of(project, name)
        if st.button(_("Save"), type="primary", disabled=suite is None or unchanged, key="suite.save"):
            suites.save_text(project, name, text)
            _say(_("Saved {name}."), name)
        with st.popover(_("Delete"), icon=":material/delete:"):
            st.caption(_("What it measured stays."))
            if st.button(_("Delete {name}").format(name=plain(name)), key="suite.delete"):
                suites.delete(project, name)
                state.forget("suite.shown")
                st.session_state.pop("suite.shown", None)
                _say(_("Deleted {name}."), name)
    if suite:
        _preview(suite.probes())
        _add_probe(project, name, [group.name for group in suite.groups])


def _checked(text: str, name: str) -> Suite | None:
    """The suite of the text in the box; None, and its mistakes with their lines, when it is none."""
    try:
        return parse_suite(text, name)
    except StudioError as error:
        show_error(error)
        return None


def _preview(probes: Sequence[Probe]) -> None:
    """What is asked, flat, as it will be asked."""
    rows = [
        {
            "group": probe.group,
            "system": next((turn["content"] for turn in probe.messages if turn["role"] == "system"), ""),
            "asked": " → ".join([*(t["content"] for t in probe.messages if t["role"] != "system"), *probe.follow_ups]),
            "must": " · ".join(_in_short(assertion) for assertion in probe.asserts),
            "language": probe.language,
        }
        for probe in probes
    ]
    st.dataframe(
        rows,
        hide_index=True,
        height=min(TABLE_HEIGHT, 38 + 36 * len(rows)),
        key="suite.preview",
        column_config={
            "group": st.column_config.TextColumn(_("Group"), width=150),
            "system": st.column_config.TextColumn(_("System prompt"), width=120),
            "asked": st.column_config.TextColumn(_("Asked"), width=380),
            "must": st.column_config.TextColumn(_("Must hold"), width=260),
            "language": st.column_config.TextColumn(_("Language"), width=75),
        },
        alt=_("The probes of the suite"),
    )


def _in_short(assertion: Assertion) -> str:
    return " ".join(filter(None, [assertion.type, shown_value(assertion)]))


def _add_probe(project: Project, name: str, groups: Sequence[str]) -> None:
    with st.form("suite.add", clear_on_submit=True, border=True):
        st.markdown(f"**{_('Add a probe')}**")
        asked = st.text_area(
            _("Question"), height=68, key="suite.ask", help=_("Several lines are turns: the model answers each.")
        )
        left, middle, right = st.columns([2, 2, 4])
        group = left.selectbox(_("Group"), groups, accept_new_options=True, key="suite.group")
        kind = middle.selectbox(
            _("The answer"), [*SIMPLE_KINDS, *(f"not-{kind}" for kind in SIMPLE_KINDS)], index=2, key="suite.kind",
            help=_("similar compares words, with 0.75 as the least likeness; mentions looks for a name."),
        )  # fmt: skip
        value = right.text_input(_("Value"), key="suite.value", help=_("Several values are divided by |"))
        if st.form_submit_button(_("Add"), icon=":material/add:"):
            with guarded():
                suites.add_probe(project, name, probe_of(asked, kind, value), group or suites.ADDED)
                st.session_state.pop(f"suite.text.{name}", None)
                _say(_("Added to {name}."), name)


def probe_of(asked: str, kind: str, value: str) -> dict[str, object]:
    """What was typed, as a probe of a suite's file."""
    turns = [line.strip() for line in asked.splitlines() if line.strip()]
    probe: dict[str, object] = {"turns": turns} if len(turns) > 1 else {"ask": "".join(turns)}
    plain_kind = kind.removeprefix("not-")
    assertion: dict[str, object] = {"type": kind}
    if plain_kind == "number":
        assertion["value"] = _number(value)
    elif plain_kind in LISTS:
        assertion["value"] = [part.strip() for part in value.split("|") if part.strip()]
    elif value.strip():
        assertion["value"] = value.strip()
    return probe | {"assert": [assertion]}


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text  # the suite says what is wrong with it


def _more(project: Project) -> None:
    """A new suite, from nothing or from a file."""
    left, middle, right = st.columns([3, 1.4, 4], vertical_alignment="bottom")
    name = left.text_input(_("New suite"), placeholder="shop", key="suite.new")
    if middle.button(_("Begin it"), disabled=not name, key="suite.begin", width="stretch"):
        with guarded():
            suites.save_text(project, name, EMPTY, new=True)
            _go_to(name, _("Made {name}."))
    file = right.file_uploader(
        _("Or from a file: YAML of a suite, or of promptfoo"), type=["yaml", "yml"], key="suite.upload"
    )
    if file and st.button(_("Import {name}").format(name=plain(file.name)), key="suite.import"):
        with guarded():
            _import(project, file.getvalue(), name or suites.name_for(file.name))


def _import(project: Project, content: bytes, name: str) -> None:
    found = suites.import_text(project, content.decode("utf-8-sig", errors="replace"), name)
    told = [f"- {_('line {line}').format(line=line)}: {plain(what)}" for line, what in found.left_out if line]
    told += [f"- {plain(what)}" for line, what in found.left_out if not line]
    left_out = "\n".join([_("These parts were left out:"), *told]) if told else ""
    _go_to(name, _("Imported {name}."), left_out)


def _go_to(name: str, words: str, more: str = "") -> None:
    state.keep("suite.go_to", name)
    _say(words, name, more)


def _say(words: str, name: str, more: str = "") -> None:
    state.keep("suite.said", "\n\n".join(filter(None, [words.format(name=plain(name)), more])))
    st.rerun()


def _notice() -> None:
    """What was done in the run before this one, said once."""
    if said := state.kept("suite.said"):
        st.success(said)
        state.forget("suite.said")
    if name := state.kept("suite.go_to"):
        st.session_state["suite.shown"] = name
        state.forget("suite.go_to")
