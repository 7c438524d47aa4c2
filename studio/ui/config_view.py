"""The pieces of the Config page."""

import json
from typing import Any

import streamlit as st

from studio import datasets, runs
from studio.config.catalog import preset
from studio.config.schema import RunConfig
from studio.projects import Project
from studio.ui import config_draft as drafts
from studio.ui import state
from studio.ui.built_in_view import open_button
from studio.ui.config_draft import Derived, Draft
from studio.ui.config_import import import_button
from studio.ui.estimate_view import estimate_panel
from studio.ui.forms import config_form
from studio.ui.frame import DATA, TRAIN, go, link
from studio.ui.i18n import _
from studio.ui.model_code_view import offer_code
from studio.ui.recipe_view import offer_data
from studio.ui.run_list import prepare_new
from studio.ui.widgets import guarded, plain, show_problems

FORM, YAML = "form", "yaml"


def pick(project: Project, draft: Draft) -> None:
    """Choose what to edit, and how."""
    left, right = st.columns([3, 2], gap="large", vertical_alignment="bottom")
    options = list(dict.fromkeys([*drafts.sources(project), draft.source]))
    key = f"config.{project.slug}.source.{draft.version}.{len(options)}"
    with left:
        chosen = st.selectbox(
            _("Preset or own config"), options, format_func=_source_word, key=key,
            index=options.index(draft.source) if draft.source in options else None,
        )  # fmt: skip
    if chosen and chosen != draft.source:
        drafts.opened(project, chosen)
        st.rerun()
    with right:
        with st.container(horizontal=True, gap="small"):
            open_button(project)
            import_button()
        words = {FORM: (_("Form"), None), YAML: (_("YAML"), None)}
        st.segmented_control(
            _("View"), list(words), default=state.kept("config.view", FORM), required=True, key="config.view",
            format_func=lambda name: words[name][0], on_change=_keep_view, label_visibility="collapsed",
        )  # fmt: skip


def _keep_view() -> None:
    state.keep("config.view", st.session_state["config.view"])


def _source_word(source: str) -> str:
    kind, _colon, name = source.partition(":")
    return _("Preset: {name}").format(name=name) if kind == drafts.PRESET else name


def edit(project: Project, draft: Draft) -> None:
    """The chosen view. While the YAML is not sound there is no form to show."""
    if state.kept("config.view", FORM) == YAML:
        _edit_yaml(draft)
    elif draft.problems and draft.text_is_newer:
        st.info(_("The form comes back when the YAML is right."), icon=":material/code:")
    else:
        names = [dataset.name for dataset in datasets.listed(project)]
        values = config_form(draft.values, names, f"config.form.{project.slug}.{draft.version}")
        if drafts.edited_form(draft, values) is not draft:
            st.rerun()


def _edit_yaml(draft: Draft) -> None:
    with st.container(key="config_yaml"):
        text = st.text_area(
        _("YAML"), draft.text, height=620, key=f"config.yaml.{draft.version}.{hash(draft.text)}",
        label_visibility="collapsed",
    )  # fmt: skip
    if text != draft.text:
        drafts.edited_text(draft, text)
        st.rerun()


def summary(project: Project, draft: Draft) -> None:
    """What is wrong, what follows, how it differs, and what to do with it."""
    if draft.problems:
        show_problems(list(draft.problems))
    config = draft.config
    _actions(project, draft, config)
    if config is None:
        return
    offer_code(config.model.base, "config")
    if problems := runs.problems_before_start(project, config):
        show_problems(problems)
        offer_data(project, config)
        link(DATA)
    with st.container(gap="xsmall", border=True):
        found = _numbers(project, config)
    estimate_panel(project, draft, config, found.num_steps)
    st.markdown(f"**{_('In a shell')}**")
    st.code(f"retune train {_shown_path(config)} --project {project.slug}", language="shell", wrap_lines=True)
    _difference(config)


def _shown_path(config: RunConfig) -> str:
    return f"configs/{config.name}.yaml"


def _actions(project: Project, draft: Draft, config: RunConfig | None) -> None:
    is_saved = draft.source.startswith(drafts.OWN) and not draft.changed
    with st.container(horizontal=True, gap="small"):
        if st.button(
            _("Start training"), type="primary", icon=":material/play_arrow:", disabled=config is None,
            key="config.start", help=_("Saves, and opens the Train page."),
        ):  # fmt: skip
            with guarded():
                _save(project, draft)
                prepare_new(drafts.current(project).config.name)
                go(TRAIN)
        label = _("Saved") if is_saved else _("Save")
        if st.button(label, icon=":material/save:", disabled=is_saved or config is None, key="config.save"):
            with guarded():
                _save(project, draft)
                st.rerun()
        with st.popover(_("Save as"), icon=":material/save_as:", disabled=config is None, key="config.as"):
            _save_as(project, draft)
    _say_what_saving_does(project, draft, config, is_saved)


def _say_what_saving_does(project: Project, draft: Draft, config: RunConfig | None, is_saved: bool) -> None:
    if config is None:
        st.caption(_("Nothing can be saved or started before this is put right."))
    elif not is_saved:
        others = config.name in runs.list_configs(project) and draft.source != f"{drafts.OWN}:{config.name}"
        words = (
            _("Not saved yet: {path}")
            if not others
            else _("Not saved yet: {path}, which is there and will be replaced")
        )
        st.caption(words.format(path=plain(_shown_path(config))))


def _save(project: Project, draft: Draft) -> None:
    saved = drafts.save(project, draft)
    state.flash(_("Saved as {path}.").format(path=plain(saved.source.partition(":")[2] + ".yaml")))


def _save_as(project: Project, draft: Draft) -> None:
    with st.form("config.as.form", border=False):
        name = st.text_input(_("New name"), placeholder="luna_lora", key="config.as.name")
        if st.form_submit_button(_("Save"), type="primary", key="config.as.go"):
            with guarded():
                _save(project, drafts.renamed(draft, name.strip()))
                st.rerun()


def _numbers(project: Project, config: RunConfig) -> Derived:
    found = drafts.derived(project, config)
    train = config.train
    per_step = f"{train.micro_batch_size} × {train.gradient_accumulation_steps}"
    if config.distributed.world_size > 1:
        per_step += f" × {config.distributed.world_size}"
    rows = [
        (_("Examples per step"), found.examples_per_step, per_step),
        (_("Steps"), found.num_steps or "—", _("{number} examples in all").format(number=found.num_examples)),
        (_("Rows in an epoch"), found.epoch_rows or "—", _passes(found)),
    ]
    for label, value, note in rows:
        st.markdown(f"{label} **{value}** :gray[{note}]")
    return found


def _passes(found: Derived) -> str:
    """How often the run goes over the data, in words."""
    if not found.epoch_rows:
        return _("once the datasets are there")
    return _("{passes:.1f} passes over them").format(passes=found.num_examples / found.epoch_rows)


def _difference(config: RunConfig) -> None:
    name = drafts.preset_for(config)
    found = drafts.differences(config, preset(name))
    if not found:
        st.caption(_("Same settings as the preset {name}.").format(name=plain(name)))
        return
    st.markdown(f"**{_('Different from the preset {name}').format(name=plain(name))}**")
    st.dataframe(
        [{"path": path, "here": _shown(here), "there": _shown(there)} for path, here, there in found],
        hide_index=True, height="content",
        column_config={
            "path": st.column_config.TextColumn(_("Setting")),
            "here": st.column_config.TextColumn(_("Here")),
            "there": st.column_config.TextColumn(_("Preset")),
        },
    )  # fmt: skip


def _shown(value: Any) -> str:
    return "—" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
