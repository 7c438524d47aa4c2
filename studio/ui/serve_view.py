"""An OpenAI-compatible endpoint on this machine: start it, see where it answers, copy an example, stop it."""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from studio import chat_client, jobs, models, request_log, runs
from studio.chat_client import Connection, Served, Status
from studio.errors import StudioError
from studio.other_servers import server_lines
from studio.paths import human_bytes
from studio.projects import Project
from studio.server_key import own_key, set_own_key
from studio.store.jobs import Job
from studio.ui.base_model import choose_base, offer_model
from studio.ui.dialogs import redraw_page
from studio.ui.frame import CHECKPOINTS, link
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel
from studio.ui.model_server import Pick, adapters_of, add_adapters, bases_of, live_server, picks_of, servers
from studio.ui.widgets import ago, guarded, plain, progress_text, state_label, stop_button

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
    base = choose_base(project, bases, "serve", _another_base)
    _start_panel(project, base, live_server(project, base))


def _another_base() -> None:
    """Adapters fit one base alone."""
    for key in ("serve.adapters", "serve.more"):
        st.session_state.pop(key, None)


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
        chosen = _adapter_picker(base, picks, picks[:1], "serve.adapters")
        left, right, _rest = st.columns([1, 1, 2])
        port = left.number_input(_("Port"), 0, 65535, 0, key="serve.port", help=_("0 takes a free one."))
        idle = right.number_input(
            _("Stops after idle minutes"), 1, 24 * 60, 30, key="serve.idle", help=_("Gives the memory back.")
        )
        with st.expander(_("Memory, limits and log"), icon=":material/tune:"):
            options = _server_options()
        pressed = st.form_submit_button(_("Start"), type="primary", icon=":material/play_arrow:")
    if pressed:
        if live_server(project, base) is None:  # another window may have started one since
            runs.start_server(project.folder, base, adapters_of(project, chosen), int(port), 60 * int(idle), **options)
        st.rerun()
    _key_panel()
    _other_servers(base, {each["name"]: Path(each["path"]) for each in adapters_of(project, chosen)}, int(port) or 8000)


def _server_options() -> dict[str, int]:
    """What `runs.start_server` takes beside base, adapters, port and idle time."""
    left, middle, right = st.columns(3)
    unload = left.number_input(
        _("Lets go of the weights after idle minutes"), 0, 24 * 60, 0, key="serve.unload",
        help=_("The server stays; the next request loads them again. 0: it keeps them."),
    )  # fmt: skip
    longest = middle.number_input(
        _("Longest answer in tokens"), 0, 131_072, 0, key="serve.longest",
        help=_("A request for more is refused. 0: as long as the model can."),
    )  # fmt: skip
    waiting = right.number_input(
        _("Requests that may wait"),
        1,
        10_000,
        128,
        key="serve.waiting",
        help=_("More are refused until some are done."),
    )
    words = st.checkbox(
        _("Keep prompts and answers in the log of requests"), key="serve.words",
        help=_("Otherwise it says who asked, when, how many tokens and how it ended, and none of the words."),
    )  # fmt: skip
    return {
        "unload_seconds": 60 * int(unload),
        "max_answer_tokens": int(longest),
        "max_waiting": int(waiting),
        "log_words": int(words),
    }


def _key_panel() -> None:
    """A key of one's own, instead of one that each server makes."""
    with st.expander(_("Key"), icon=":material/key:"):
        if own_key():
            st.caption(_("Servers that start from now on take your own key."))
            if st.button(_("Forget my key"), key="serve.key.forget"):
                set_own_key("")
                st.rerun()
            return
        st.caption(_("Each server makes a key for itself. With your own, programs need not be told anew."))
        with st.form("serve.key", border=False, clear_on_submit=True):
            text = st.text_input(_("My key"), type="password", key="serve.key.text", help=_("16 letters or more."))
            if st.form_submit_button(_("Save")):
                set_own_key(text)
                st.rerun()


def _other_servers(base: str, adapters: dict[str, Path], port: int) -> None:
    """The same with vLLM or LMDeploy, for where they are."""
    with st.expander(_("Other servers"), icon=":material/terminal:"):
        for line in server_lines(base, adapters, port):
            st.caption(line.tool if line.is_installed else _("{tool} is not installed here.").format(tool=line.tool))
            st.code(line.command, language="bash", wrap_lines=True)


def _load_form(project: Project, base: str, connection: Connection, picks: Sequence[Pick]) -> None:
    status = _status(connection)
    if status is None:
        return
    loaded = [each.name for each in status.models]
    missing = [pick for pick in picks if pick.name not in loaded]
    if not missing:
        st.caption(_("Every converted checkpoint is loaded."))
        return
    with st.form("serve.load", border=False):
        chosen = _adapter_picker(base, missing, [], "serve.more")
        if st.form_submit_button(_("Load"), type="primary", icon=":material/add:"):
            add_adapters(project, connection, chosen)
            st.rerun()


def _adapter_picker(base: str, picks: Sequence[Pick], default: Sequence[Pick], key: str) -> list[Pick]:
    """Each form keeps its own: what a running server was given last is not what the next one starts with."""
    by_name = {pick.name: pick for pick in picks}
    names = st.multiselect(
        _("On the base model {base}").format(base=plain(base)),
        list(by_name),
        default=[pick.name for pick in default],
        format_func=lambda name: by_name[name].label,
        placeholder=_("Adapters"),
        key=key,
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
        _requests(project, job)
        with st.expander(_("Log"), icon=":material/article:"):
            text = jobs.tail(Path(job.log_path)) if job.log_path else ""
            st.code(text or _("Nothing was written yet."), language=None, height=240, wrap_lines=True)


def _requests(project: Project, job: Job) -> None:
    """Who asked, when, and how it ended."""
    with st.expander(_("Requests"), icon=":material/list:"):
        found = request_log.read(project.path("jobs", job.id))
        if not found:
            st.caption(_("Nobody asked yet. Copy an example above and try it."))
            return
        st.dataframe([_request_row(asked) for asked in found], hide_index=True)


def _request_row(asked: request_log.Asked) -> dict[str, object]:
    row: dict[str, object] = {
        _("When"): ago(asked.at),
        _("Who"): asked.who,
        _("Model"): asked.model,
        _("Prompt tokens"): asked.prompt_tokens,
        _("Answer tokens"): asked.answer_tokens,
        _("Seconds"): asked.seconds,
        _("First text after"): asked.first_seconds,
        _("Ended"): _end_word(asked),
    }
    return row | ({_("Asked"): asked.prompt, _("Answered"): asked.answer} if asked.prompt or asked.answer else {})


def _end_word(asked: request_log.Asked) -> str:
    words = {
        "stop": _("by itself"),
        "length": _("at its length"),
        "cancelled": _("the client left"),
        "error": _("error: {what}").format(what=asked.error),
    }
    return words.get(asked.end, asked.end)


@guarded()
def _wait(project: Project, job_id: str) -> None:
    """Progress of loading; redraws the page when the server answers."""
    job = jobs.get(project.folder, job_id)
    if not job.live or runs.server_connection(project, job):
        redraw_page()
    st.progress(min(1.0, job.current / job.total) if job.total else 0.0, text=progress_text(job))


def _endpoint(project: Project, job: Job, connection: Connection) -> None:
    left, right = st.columns(2)
    with left:
        st.caption(_("Endpoint"))
        st.code(f"{connection.url}/v1", language=None)
    with right:
        st.caption(_("Key"))
        shown = st.session_state.get(f"serve.show.{job.id}", False)
        st.code(connection.token if shown else HIDDEN_TOKEN, language=None)
        st.toggle(_("Show the key"), key=f"serve.show.{job.id}")
    status = _status(connection)
    if status is None:
        return
    _loaded_now(job, connection, status)
    model = status.models[-1].name
    shell, python = st.tabs(["curl", "openai"])
    shell.code(curl_example(connection.url, model), language="bash", wrap_lines=True)
    python.code(openai_example(connection.url, model), language="python", wrap_lines=True)
    st.caption(
        _("Put the key into RETUNE_TOKEN. It is kept in {path}, which only you can read.").format(
            path=plain(f"jobs/{job.id}/connection.json")
        )
    )


def _loaded_now(job: Job, connection: Connection, status: Status) -> None:
    """Each model with a way out, and the weights as a whole."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(_state_line(status))
        if status.loaded and st.button(
            _("Let go of the weights"), key=f"serve.unload.{job.id}", help=_("The next request loads them again.")
        ):
            chat_client.unload(connection)
            st.rerun()
    for model in status.models:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"{plain(model.name)} · {_kind_word(model)}")
            if model.kind != "base" and st.button(
                _("Take out"), key=f"serve.out.{job.id}.{model.name}", icon=":material/close:", type="tertiary"
            ):
                chat_client.remove_adapter(connection, model.name)
                st.rerun()
        for warning in model.warnings:
            st.warning(plain(warning))


def _state_line(status: Status) -> str:
    words = _("{memory} in memory") if status.loaded else _("Weights not loaded; the next request loads them.")
    asked = _("{asked} answered, {now} being answered, {waiting} waiting")
    return (words + " · " + asked).format(
        memory=human_bytes(status.memory_bytes),
        asked=status.num_asked,
        now=status.num_answering,
        waiting=status.num_waiting,
    )


def _kind_word(model: Served) -> str:
    return {"base": _("base model"), "adapter": _("adapter"), "model": _("full model")}.get(model.kind, model.kind)


def _status(connection: Connection) -> Status | None:
    """None, with the reason shown, when the server does not answer."""
    try:
        return chat_client.status(connection)
    except StudioError as error:
        st.warning(plain(str(error)))
        return None


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
