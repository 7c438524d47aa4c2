"""Renders chat templates in a process of its own, which the kernel stops when a template eats time or memory.

Run as a program it answers one JSON line per JSON line. It imports nothing of the studio, so that it starts
quickly. The environment gives templates what transformers gives them, so the strings are the same.
"""

import datetime
import json
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SECONDS = 3.0
MAX_MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 8_000_000
# Private-use characters that frame what a {% generation %} block wrote. The caller takes them out again.
GENERATION_START, GENERATION_END = "\U0010fff2", "\U0010fff3"


class GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's part of a rendered chat."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_frame"), [], [], body).set_lineno(line)

    def _frame(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class GuardedNamespace(Namespace):
    """Jinja's namespace without underscore names, which lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")
        super().__setitem__(name, value)


def guarded_namespace(*args: Any, **attributes: Any) -> GuardedNamespace:
    space = GuardedNamespace()
    for name, value in dict(*args, **attributes).items():
        space[name] = value
    return space


def new_dict(*args: Any, **items: Any) -> dict[Any, Any]:
    """`dict(...)` as a function: the class itself would offer its attributes to the template."""
    return dict(*args, **items)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": guarded_namespace,
        "dict": new_dict,
    }
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    text = template.render(variables)
    if len(text) > MAX_CHARACTERS:
        raise jinja2.exceptions.TemplateError(f"it wrote {len(text):,} characters; {MAX_CHARACTERS:,} are allowed")
    return text


def render_chat(source: str, base: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    """{"texts": [...]}, one for each cut (number of messages, generation prompt or not); {"error"} if it raises.

    A text that the first one begins with is told by its length: most are, and need not be written again.
    """
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        template, messages = compile_template(source), chat["messages"]
        base = base | {"tools": chat["tools"]}
        cuts = [
            base | {"messages": messages[:number], "add_generation_prompt": prompt} for number, prompt in chat["cuts"]
        ]
        first, *others = (render(template, variables) for variables in cuts)
        return {"texts": [first, *(len(text) if first.startswith(text) else text for text in others)]}
    except MemoryError:
        return {"error": "it needs more memory than a chat template may use"}
    except Exception as error:
        return {"error": f"{error}" or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve() -> None:
    """Answer until the input ends. SIGPROF's default action ends this process, inside C code too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with its input
    if sys.platform == "linux":  # elsewhere the kernel does not enforce RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for line in sys.stdin:
        request = json.loads(line)
        replies = [render_chat(request["source"], request["base"], chat) for chat in request["chats"]]
        sys.stdout.write(json.dumps(replies) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
