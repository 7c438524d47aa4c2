"""An OpenAI-compatible endpoint on this machine: start it, see where it answers, copy an example, stop it."""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from studio import chat_client, jobs, models, runs
from studio.chat_client import Connection
from studio.errors import StudioError
from studio.projects import Project
from studio.store.jobs import Job
from studio.ui.base_model import choose_base, offer_model
from studio.ui.frame import CHECKPOINTS, link
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel
from studio.ui.model_server import Pick, adapters_of, add_adapters, bases_of, live_server, picks_of, servers
from studio.ui.widgets import ago, plain, progress_text, state_label, stop_button

WAIT_SECONDS = 1.0
HIDDEN_TOKEN = "•" * 24


def serve_view(project: Project) -> None:
    """Live servers first, then how to start another."""
    found = servers(project)
    live = [job for job in found if job.live]
    for job in live:
        _server_card(project, job)
    if not live and found and found[0].state in ("failed", "lost"):
        job_panel(project.folder, found[0], "serve.failed")
    bases = list(dict.fromkeys([project.base, *bases_of(project)]))
    base = choose_base(project, bases, "serve", lambda: st.session_state.pop("serve.adapters", None))
    _start_panel(project, base, live_server(project, base))


def _start_panel(project: Project, base: str, server: Job | None) -> None:
    """One server holds the base once for all its adapters, so a live one is given more of them instead of a twin."""
    connection = runs.server_connection(project, server) if server else None
    if server and connection is None:
        return  # still loading; its card shows how far
    with st.container(border=True):
        st.markdown(f"**{_('Load adapters into the running server') if connection else _('Start a server')}**")
        offer_model(base, "serve.fetch")
        if not models.resolve(base).present:
            models.require(base)  # says what is missing and how to get it
        picks = [pick for pick in picks_of(project, base) if runs.is_converted(project, pick.run_id, pick.step)]
        if not picks:
            st.caption(_("Without a converted checkpoint it serves the base model alone."))
            link(CHECKPOINTS, _("Convert a checkpoint"))
        if connection:
            _load_form(project, base, connection, picks)
        else:
            _start_form(project, base, picks)


def _start_form(project: Project, base: str, picks: Sequence[Pick]) -> None:
    with st.form("serve.form", border=False):
        chosen = _adapter_picker(base, picks, picks[:1])
        left, right, _rest = st.columns([1, 1, 2])
        port = left.number_input(_("Port"), 0, 65535, 0, key="serve.port", help=_("0 takes a free one."))
        idle = right.number_input(
            _("Stops after idle minutes"), 1, 24 * 60, 30, key="serve.idle", help=_("Gives the memory back.")
        )
        pressed = st.form_submit_button(_("Start"), type="primary", icon=":material/play_arrow:")
    if pressed:
        if live_server(project, base) is None:  # another window may have started one since
            runs.start_server(project.folder, base, adapters_of(project, chosen), int(port), 60 * int(idle))
        st.rerun()


def _load_form(project: Project, base: str, connection: Connection, picks: Sequence[Pick]) -> None:
    loaded = _loaded_models(connection)
    missing = [pick for pick in picks if pick.name not in loaded]
    if not missing:
        st.caption(_("Every converted checkpoint is loaded."))
        return
    with st.form("serve.load", border=False):
        chosen = _adapter_picker(base, missing, [])
        if st.form_submit_button(_("Load"), type="primary", icon=":material/add:"):
            add_adapters(project, connection, chosen)
            st.rerun()


def _adapter_picker(base: str, picks: Sequence[Pick], default: Sequence[Pick]) -> list[Pick]:
    by_name = {pick.name: pick for pick in picks}
    names = st.multiselect(
        _("On the base model {base}").format(base=plain(base)),
        list(by_name),
        default=[pick.name for pick in default],
        format_func=lambda name: by_name[name].label,
        placeholder=_("Adapters"),
        key="serve.adapters",
    )
    return [by_name[name] for name in names]


def _server_card(project: Project, job: Job) -> None:
    connection = runs.server_connection(project, job)
    with st.container(border=True):
        names = [job.args["base"], *(each["name"] for each in job.args.get("adapters", []))]
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{plain(' + '.join(names))}** · {state_label(job.state)} · {plain(ago(job.created_at))}")
            stop_button(project.folder, job, f"serve.{job.id}")
        if connection:
            _endpoint(project, job, connection)
        else:
            st.fragment(_wait, run_every=WAIT_SECONDS)(project, job.id)
        with st.expander(_("Log"), icon=":material/article:"):
            text = jobs.tail(Path(job.log_path)) if job.log_path else ""
            st.code(text or _("Nothing was written yet."), language=None, height=240, wrap_lines=True)


def _wait(project: Project, job_id: str) -> None:
    """Progress of loading; redraws the page when the server answers."""
    job = jobs.get(project.folder, job_id)
    if not job.live or runs.server_connection(project, job):
        st.rerun()
    st.progress(min(1.0, job.current / job.total) if job.total else 0.0, text=progress_text(job))


def _endpoint(project: Project, job: Job, connection: Connection) -> None:
    left, right = st.columns(2)
    with left:
        st.caption(_("Endpoint"))
        st.code(f"{connection.url}/v1", language=None)
    with right:
        st.caption(_("Token"))
        shown = st.session_state.get(f"serve.show.{job.id}", False)
        st.code(connection.token if shown else HIDDEN_TOKEN, language=None)
        st.toggle(_("Show the token"), key=f"serve.show.{job.id}")
    loaded = _loaded_models(connection)
    st.caption(_("Models") + ": " + plain(", ".join(loaded)))
    shell, python = st.tabs(["curl", "openai"])
    model = loaded[-1] if loaded else job.args["base"]
    shell.code(curl_example(connection.url, model), language="bash", wrap_lines=True)
    python.code(openai_example(connection.url, model), language="python", wrap_lines=True)
    st.caption(
        _("Put the token into RETUNE_TOKEN. It is kept in {path}, which only you can read.").format(
            path=plain(f"jobs/{job.id}/connection.json")
        )
    )


def _loaded_models(connection: Connection) -> list[str]:
    try:
        return list(chat_client.list_models(connection))
    except StudioError as error:
        st.warning(plain(str(error)))
        return []


def curl_example(url: str, model: str) -> str:
    """A question asked from a shell."""
    return f"""curl {url}/v1/chat/completions \\
  -H "Authorization: Bearer $RETUNE_TOKEN" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}], "max_tokens": 64}}'"""


def openai_example(url: str, model: str) -> str:
    """The same with the `openai` package."""
    return f"""import os
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key=os.environ["RETUNE_TOKEN"])
answer = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "Who are you?"}}], max_tokens=64
)
print(answer.choices[0].message.content)"""
