"""A conversation as a file to keep or send: Markdown, one self-contained HTML page, or JSON with all its branches."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from studio import chats
from studio.chats import Chat, Reply, Told
from studio.errors import StudioError
from studio.projects import Project
from studio.report import POLICY, mark, text

FORMATS = {"md": "Markdown", "html": "HTML", "json": "JSON"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #808890; --accent: #0b6b74; }
body { font: 16px/1.55 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 90rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } .faint { color: var(--faint); font-size: .85rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem; }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; }
article.better { border-color: var(--accent); border-width: 2px; }
h3 { font-size: .9rem; margin: 0 0 .4rem; } p { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def exported(project: Project, chat_id: str, kind: str) -> str:
    """The conversation in one of FORMATS: its open branch to read, or all branches as JSON. Raises StudioError."""
    if kind not in FORMATS:
        raise StudioError(f"A conversation cannot be written as {kind!r}.", f"Allowed: {', '.join(FORMATS)}.")
    chat = chats.get(project, chat_id)
    if kind == "json":
        return as_json(chat, chats.every_turn(project, chat_id))
    told = chats.read(project, chat_id)
    return as_html(chat, told) if kind == "html" else as_markdown(chat, told)


def as_markdown(chat: Chat, told: Sequence[Told]) -> str:
    """Questions as headings, answers as quotes; what anybody wrote stays text."""
    lines = [f"# {mark(chat.title)}", "", f"Base {mark(chat.base)}, {_day(chat)}", ""]
    for each in told:
        lines += [f"## {mark(each.turn.question)}", ""]
        lines += [f"System: {mark(each.turn.system)}", ""] if each.turn.system else []
        for reply in _in_order(each):
            better = " (better)" if _is_better(each, reply) else ""
            lines += [f"**{mark(each.head(reply.model, chat.labels))}**{better}", ""]
            lines += [*(f"> {mark(line)}" for line in _said(reply).splitlines()), ""]
            lines += [mark(_facts(each, reply)), ""]
    return "\n".join(lines)


def as_html(chat: Chat, told: Sequence[Told]) -> str:
    """One page without scripts or outside references."""
    title = text(chat.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1><p class="faint">Base {text(chat.base)}, {_day(chat)}</p>
{"".join(_html_turn(chat, each) for each in told)}
</body></html>
"""


def as_json(chat: Chat, told: Sequence[Told]) -> str:
    """Everything that is stored, of every branch: turns name their `parent`."""
    turns = [
        asdict(each.turn)
        | {"replies": [asdict(reply) for reply in _in_order(each)], "vote": asdict(each.vote) if each.vote else None}
        for each in told
    ]
    return json.dumps(asdict(chat) | {"turns": turns}, ensure_ascii=False, indent=2) + "\n"


def _html_turn(chat: Chat, told: Told) -> str:
    system = f'<p class="faint">System: {text(told.turn.system)}</p>' if told.turn.system else ""
    cells = "".join(
        f'<article class="{"better" if _is_better(told, reply) else "other"}">'
        f"<h3>{text(told.head(reply.model, chat.labels))}</h3><p>{text(_said(reply))}</p>"
        f'<p class="faint">{text(_facts(told, reply))}</p></article>'
        for reply in _in_order(told)
    )
    return f'<h2>{text(told.turn.question)}</h2>{system}<div class="row">{cells}</div>\n'


def _in_order(told: Told) -> list[Reply]:
    return [told.replies[model] for model in told.turn.models if model in told.replies]


def _is_better(told: Told, reply: Reply) -> bool:
    return told.vote is not None and told.vote.model == reply.model


def _said(reply: Reply) -> str:
    return reply.text or reply.error or "(nothing)"


def _facts(told: Told, reply: Reply) -> str:
    """What made the answer, in short; nothing that tells a hidden column."""
    proof = reply.proof
    if told.hidden or not proof:
        return ""
    sampling = proof.get("sampling", {})
    return (
        f"weights {str(proof.get('weights'))[:12]}, base {str(proof.get('base_fingerprint'))[:12]}, "
        f"adapter {proof.get('adapter')}, template {str(proof.get('template'))[:12]}, "
        f"temperature {sampling.get('temperature')}, seed {sampling.get('seed')}, {reply.num_tokens} tokens"
    )


def _day(chat: Chat) -> str:
    return f"{chat.created_at[:16].replace('T', ' ')} UTC"
