"""Ollama: its Modelfile (which file, how it is spoken to, what ends an answer), and `ollama create`."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.data.go_template import GoTemplate, go_template
from studio.data.named import writes_date
from studio.data.talk import read_talk
from studio.data.template import read_json
from studio.engine.equality import PROBES
from studio.engine.equivalence import Expected, Verdict, other_prompts
from studio.engine.job import JobContext
from studio.engine.push import require_passed
from studio.engine.tools import run_tool
from studio.engine.weights import GENERATION_CONFIG
from studio.errors import StudioError

MODELFILE = "Modelfile"
LONGEST_CONTEXT = 8192
"""Ollama keeps room for a whole context; longer ones are for those who ask for them (PARAMETER num_ctx)."""
DATE_STANDS = "# The model's own template writes the day's date. In this one the date of the export stands still."
TEMPLATE = re.compile(r'^TEMPLATE """(.*?)"""$', re.DOTALL | re.MULTILINE)
STOP = re.compile(r'^PARAMETER stop (?:"""(.*?)"""|"([^"\n]*)")$', re.DOTALL | re.MULTILINE)
SAMPLED = ("temperature", "top_k", "top_p", "repetition_penalty")
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}


def run(job: JobContext) -> dict[str, Any]:
    """Args: export (its folder), name. `ollama create`, with the Ollama of this machine.

    Raises StudioError for a folder that is no export or failed its gate, and when Ollama is not here or refuses.
    """
    folder, name = Path(job.args["export"]), str(job.args["name"])
    require_passed(folder)
    if not (folder / MODELFILE).is_file():
        raise StudioError(f"{folder.name!r} has no {MODELFILE}.", "Export it for Ollama: retune export ollama RUN.")
    job.phase("creating it in Ollama")
    run_tool(job, ["ollama", "create", name, "-f", MODELFILE], folder, "Install Ollama: https://ollama.com/download")
    return {"name": name, "command": f"ollama run {name}"}


def modelfile(file: str, expected: Expected, adds_bos: bool, folder: Path, context: int) -> str:
    """The text of a Modelfile. `folder`: the weights, for what they say of sampling and stops.

    Go's template language cannot ask for the date; where the model's own template writes it, a comment says so.
    Raises DataError for a template that Go cannot write, StudioError for one that a Modelfile cannot hold.
    """
    template = ollama_template(expected, adds_bos)
    settings = [("stop", each) for each in stops(expected, folder)] + sampling(read_json(folder / GENERATION_CONFIG))
    settings.append(("num_ctx", min(context, LONGEST_CONTEXT)))
    lines = [DATE_STANDS] if writes_date(expected.template) else []
    lines += [f"FROM ./{file}", f'TEMPLATE """{template.source}"""']
    return "\n".join(lines + [f"PARAMETER {name} {_value(value)}" for name, value in settings]) + "\n"


def with_modelfile(verdict: Verdict, text: str, expected: Expected, adds_bos: bool) -> Verdict:
    """The verdict on a GGUF file, with that on its Modelfile: the prompts and the stops that Ollama takes from there.

    Raises StudioError for a Modelfile that cannot be read back.
    """
    source, found = TEMPLATE.search(text), {one or other for one, other in STOP.findall(text)}
    if source is None:
        raise StudioError(f"The {MODELFILE} has no template.", "Export it again.")
    template, begin = GoTemplate.read(source[1]), expected.reference.prompts[0][:1] if adds_bos else []
    chats = [[{"role": "user", "content": question}] for question in PROBES]
    prompts = [[*begin, *expected.tokenizer.encode(template.render(chat))] for chat in chats]
    others = {*verdict.other_prompts, *other_prompts(expected.reference, prompts)}
    ends = [expected.tokenizer.decode([end]) for end in expected.reference.ends]
    lacking = [end for end in ends if end in verdict.lacking_ends or (end and end not in found)]
    return replace(
        verdict,
        other_prompts=tuple(question for question in PROBES if question in others),
        lacking_ends=tuple(lacking),
    )


def ollama_template(expected: Expected, adds_bos: bool) -> GoTemplate:
    found = go_template(expected.template)
    if '"""' in found.source:
        raise StudioError('A Modelfile cannot hold this template: it has """ in it.', "Export GGUF alone.")
    return found.without_bos(expected.template.special_tokens.get("bos_token", "")) if adds_bos else found


def stops(expected: Expected, folder: Path) -> list[str]:
    """Texts that end an answer: the tokens that do, and those of a named template."""
    tokens = [expected.tokenizer.decode([number]) for number in expected.reference.ends]
    talk = read_talk(folder)
    return list(dict.fromkeys(filter(None, [*tokens, *(talk.stops if talk else ())])))


def sampling(generation_config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How the model wants to be sampled, where it says so."""
    found = ((name, generation_config.get(name)) for name in SAMPLED)
    return [(OLLAMA_NAMES.get(name, name), value) for name, value in found if isinstance(value, int | float)]


def _value(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    if '"' in value or "\n" in value:
        return f'"""{value}"""'
    return f'"{value}"'
