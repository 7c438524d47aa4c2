"""The pieces of the Home page."""

import streamlit as st

from studio import models
from studio.projects import Project, archive_project, create_project, delete_project, list_projects
from studio.ui import state
from studio.ui.base_model import offer_model
from studio.ui.bundle_view import reproduce_form
from studio.ui.frame import DATA, SERVE, STEPS, go, link
from studio.ui.i18n import _
from studio.ui.steps import Overview, Step, overview, rate
from studio.ui.widgets import ago, guarded, plain, state_label

CARDS_IN_A_ROW = 3


def base_model(project: Project | None) -> None:
    """Offer the base model of the project in use, the starter before there is one, while it is not on this machine."""
    base = project.base if project else models.STARTER
    model = models.resolve(base)
    if model.present or model.kind == "folder":
        return
    with st.container(border=True):
        if base == models.STARTER:
            st.markdown(f"**:material/download: {_('Get the starter model')}**")
            st.markdown(_("SmolLM2-135M, a small chat model (about 100 MB to fetch), is what the presets train."))
        else:
            st.markdown(f"**:material/download: {_('Get the base model {base}').format(base=plain(base))}**")
            st.markdown(_("This project starts from it."))
        offer_model(base, "home.fetch")


def welcome() -> None:
    """Before the first project: what this is for, in one look."""
    st.markdown(_("Give a chat model a name and a maker, train it on this machine, and measure what changed."))
    _step_strip([Step(page, False, "") for page in STEPS], None)


def continue_here(project: Project) -> None:
    """The six steps of the project in use; the next one stands out."""
    seen = overview(project)
    if seen.problem:
        st.error(plain(seen.problem), icon=":material/error:")
        return
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader(plain(project.name), anchor=False)
        if (step := seen.next_step) is not None:
            label = _("Next: {page}").format(page=_(step.page.title))
            if st.button(label, type="primary", icon=step.page.icon, key="home.next"):
                go(step.page)
    _step_strip(list(seen.steps), seen.next_step)


def _step_strip(steps: list[Step], upcoming: Step | None) -> None:
    for number, (column, step) in enumerate(zip(st.columns(len(steps)), steps, strict=True), start=1):
        with column.container(border=True, gap="xsmall", height="stretch"):
            mark = ":green[:material/check_circle:]" if step.done else ":material/arrow_circle_right:"
            icon = mark if step.done or step is upcoming else ":gray[:material/circle:]"
            st.markdown(f"{icon} :small[{number}]")
            link(step.page)
            st.caption(step.words or _purpose(number))


def _purpose(number: int) -> str:
    return [
        _("say who it is"),
        _("choose a preset"),
        _("watch it learn"),
        _("keep and convert"),
        _("before and after, measured"),
        _("use it"),
    ][number - 1]


def projects_and_new(current: Project | None) -> None:
    found = list_projects()
    _new_project(first=not found)
    reproduce_form()
    if found:
        st.subheader(_("Projects"), anchor=False)
        _cards(found, current)
    archived = [each for each in list_projects(archived=True) if each.archived_at]
    if archived:
        with st.expander(_("Archived projects ({number})").format(number=len(archived))):
            _cards(archived, current)


def _new_project(first: bool) -> None:
    with st.form("home.new", border=first, clear_on_submit=True, enter_to_submit=True):
        columns = st.columns([4, 3, 1], vertical_alignment="bottom")
        label = _("Name of your first project") if first else _("New project")
        name = columns[0].text_input(label, max_chars=120, placeholder=_("For example: Luna"), key="home.name")
        base = columns[1].selectbox(
            _("Base model"), _known_bases(), key="home.base", accept_new_options=True,
            help=_("What training starts from. Choose one, or type a Hugging Face id, modelscope:ID or a folder."),
        )  # fmt: skip
        kind = "primary" if first else "secondary"
        submitted = columns[2].form_submit_button(
            _("Create"), type=kind, icon=":material/add:", width="stretch", key="home.create"
        )
    if submitted:
        with guarded():
            state.choose_project(create_project(name, base).slug)
            go(DATA)


def _known_bases() -> list[str]:
    """The starter, then what else is on this machine."""
    return list(dict.fromkeys([models.STARTER, *(model.name for model in models.list_models())]))


def _cards(found: list[Project], current: Project | None) -> None:
    for first in range(0, len(found), CARDS_IN_A_ROW):
        for column, project in zip(st.columns(CARDS_IN_A_ROW), found[first : first + CARDS_IN_A_ROW], strict=False):
            with column.container(border=True, height="stretch", gap="xsmall", key=f"home.card.{project.slug}"):
                _card(overview(project), bool(current and current.slug == project.slug))


def _card(seen: Overview, is_current: bool) -> None:
    project = seen.project
    mark = f" :primary-badge[{_('open')}]" if is_current else ""
    st.markdown(f"**{plain(project.name)}**{mark}")
    st.caption(f"{plain(project.base)} · {ago(project.created_at)} · {plain(project.slug)}")
    st.markdown(f":small[{_card_state(seen)}]")
    with st.container(horizontal=True, gap="small"):
        if not is_current and not project.archived_at:
            st.button(_("Open"), key=f"home.open.{project.slug}", on_click=state.choose_project, args=(project.slug,))
        with st.popover("", icon=":material/more_horiz:", key=f"home.more.{project.slug}"):
            _manage(project)


def _card_state(seen: Overview) -> str:
    if seen.problem:
        return f":material/error: {plain(seen.problem)}"
    if seen.best:
        identity, leakage = rate(seen.best, "identity"), rate(seen.best, "leakage")
        scores = _("identity {identity:.0%}, leakage {leakage:.0%}").format(identity=identity, leakage=leakage)
        return f":material/check_circle: {plain(seen.best.subject)}: {scores}"
    if seen.last_run:
        return f"{plain(seen.last_run.id)}: {state_label(seen.last_run.state)}"
    step = seen.next_step
    return _("Next: {page}").format(page=_((step.page if step else SERVE).title))


def _manage(project: Project) -> None:
    archived = bool(project.archived_at)
    label = _("Show again") if archived else _("Archive")
    st.button(label, key=f"home.archive.{project.slug}", icon=":material/archive:", on_click=_archive, args=(project,))
    st.divider()
    question = _("Delete with all data, runs and checkpoints. This cannot be undone. Type {slug} to confirm:")
    st.markdown(question.format(slug=f"**{plain(project.slug)}**"))
    typed = st.text_input(
        _("Name of the folder"), key=f"home.sure.{project.slug}", label_visibility="collapsed", autocomplete="off"
    )
    st.button(
        _("Delete for good"), key=f"home.delete.{project.slug}", icon=":material/delete_forever:",
        disabled=typed.strip() != project.slug, on_click=_delete, args=(project,),
    )  # fmt: skip


def _archive(project: Project) -> None:
    with guarded():
        archive_project(project.slug, archived=not project.archived_at)
        if not project.archived_at:
            state.forget_project()


def _delete(project: Project) -> None:
    with guarded():
        delete_project(project.slug)
        state.forget_project()
        state.flash(_("Project {name} is deleted.").format(name=plain(project.name)))
