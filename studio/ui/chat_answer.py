"""What can be done with one answer: see what made it, with the exact prompt; keep it, repaired, as a row."""

import json
from typing import Any

import streamlit as st

from studio import chat_client, chats
from studio.chat_client import Connection
from studio.chats import Reply, Told
from studio.projects import Project
from studio.ui import chat_state
from studio.ui.chat_keep import keep_dialog
from studio.ui.dialogs import dialog
from studio.ui.i18n import _
from studio.ui.widgets import guarded, plain


def answer_tools(project: Project, told: Told, reply: Reply, label: str, connection: Connection | None) -> None:
    """Small buttons at the foot of an answer; who is hidden does not show what made it."""
    if chat_state.demo_is_on():
        return
    key = f"compare.answer.{reply.turn_id}.{reply.model}"
    if (
        not told.hidden
        and reply.proof
        and st.button("", icon=":material/info:", key=f"{key}.proof", type="tertiary", help=_("What made this answer"))
    ):
        dialog(_("What made this answer"), _proof, project, told, reply, label, connection, width="medium")
    if (
        not told.hidden
        and reply.text
        and st.button(
            "",
            icon=":material/edit_note:",
            key=f"{key}.keep",
            type="tertiary",
            help=_("Keep this answer, or a better one"),
        )
    ):
        dialog(_("Keep this answer"), keep_dialog, project, told, reply, label, width="medium")


def _proof(project: Project, told: Told, reply: Reply, label: str, connection: Connection | None) -> None:
    proof = reply.proof
    st.markdown(f"**{plain(label)}**")
    for name, value in _lines(reply):
        left, right = st.columns([1, 3], vertical_alignment="center")
        left.caption(name)
        right.markdown(value)
    with st.expander(_("As it is stored, with whole hashes"), icon=":material/data_object:"):
        st.code(json.dumps(proof, ensure_ascii=False, indent=2), language="json", wrap_lines=True)
    with guarded():
        _exact_prompt(project, told, reply, connection)


def _lines(reply: Reply) -> list[tuple[str, str]]:
    """What made it, as Markdown."""
    proof, used = reply.proof, reply.proof.get("sampling", {})
    adapter = {
        "on": _("adapter on"),
        "off": _("no adapter: the base alone"),
        "full model": _("a full model of its own"),
    }
    bits = f" · {_('{number} bits').format(number=proof['bits'])}" if proof.get("bits") else ""
    return [
        (_("Weights"), f"{_hash(proof, 'weights')} · {adapter.get(proof.get('adapter', ''), '')}"),
        (_("Base"), f"{plain(proof.get('base', ''))} · {_hash(proof, 'base_fingerprint')}"),
        (_("Template"), f"{_hash(proof, 'template')}"),
        (_("Prompt"), f"{_hash(proof, 'prompt_sha256')} · " + _tokens(proof.get("num_prompt_tokens", 0))),
        (_("Sampling"), plain(_sampling(used))),
        (_("Computed in"), plain(str(proof.get("dtype", ""))) + bits),
        (_("Answer"), f"{_tokens(reply.num_tokens)} · {reply.seconds:.2f} s"),
    ]


def _hash(proof: dict[str, Any], name: str) -> str:
    return f"`{str(proof.get(name, ''))[:16]}`"


def _tokens(number: int) -> str:
    return _("{number} tokens").format(number=number)


def _sampling(used: dict[str, Any]) -> str:
    if not used.get("temperature"):
        return _("the likeliest token each time, at most {number}").format(number=used.get("max_new_tokens", ""))
    return _("temperature {temperature}, top p {top_p}, seed {seed}, at most {number}").format(
        temperature=used["temperature"], top_p=used.get("top_p"), seed=used.get("seed"),
        number=used.get("max_new_tokens"),
    )  # fmt: skip


def _exact_prompt(project: Project, told: Told, reply: Reply, connection: Connection | None) -> None:
    """What the model read, rendered anew and held against the hash that was stored."""
    if connection is None:
        st.caption(_("Load the columns to see the exact prompt."))
        return
    if not st.toggle(_("Show the exact prompt"), key=f"compare.prompt.{reply.turn_id}.{reply.model}"):
        return
    before = chats.before(project, told.turn)
    messages = chats.messages(before, reply.model, told.turn.system, told.turn.question)
    found = chat_client.rendered_prompt(connection, reply.model, messages)
    st.code(found["text"], language=None, wrap_lines=True)
    if found["prompt_sha256"] == reply.proof.get("prompt_sha256"):
        st.success(_("Its hash is the one stored with the answer: this is what the model read."))
    else:
        st.warning(_("Its hash is another than the one stored: template or weights have changed since."))
