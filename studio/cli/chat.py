"""`retune chat`, `agent` and `serve`: talk to base and tuned weights, in the shell or in OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio import models
from studio.cli import conversation, show
from studio.cli.follow import follow
from studio.cli.lazy import agent_session, chat_client, jobs, named, projects, runs, steps, talk
from studio.cli.options import JsonOption, ProjectOption, base_model, checkpoint_step, chosen
from studio.errors import ServerError, StudioError
from studio.models import STARTER
from studio.paths import system_folder, typed_path

if TYPE_CHECKING:
    from studio.chat_client import Connection
    from studio.projects import Project
    from studio.store.jobs import Job

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="RUN, RUN:STEP or an adapter folder; may be given again."),
]
BaseOption = Annotated[str, typer.Option(help="Base model; the project's when left out.")]
PromptOption = Annotated[str, typer.Option(help="Ask this once and leave, instead of a conversation.")]
TemperatureOption = Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")]
TemplateOption = Annotated[
    str, typer.Option("--prompt-template", help="A named template for all; as each was trained when left out.")
]
ToolsOption = Annotated[
    str, typer.Option("--with-plugins", help="Tools it may call, with commas: calculate,solve,search.")
]
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def serve(
    adapter: Adapters = None,
    base: BaseOption = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    idle_minutes: Annotated[int, typer.Option(min=0, help="Stop after this long without a request; 0 never.")] = 0,
    unload_minutes: Annotated[
        int, typer.Option(min=0, help="Let go of the weights after this long, until somebody asks; 0 never.")
    ] = 0,
    max_answer_tokens: Annotated[int, typer.Option(min=0, help="Refuse requests for longer answers; 0: none.")] = 0,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 128,
    log_words: Annotated[bool, typer.Option("--log-words", help="Keep prompts and answers in the log.")] = False,
    project: ProjectOption = "",
) -> None:
    """Serve base and adapters on 127.0.0.1, in OpenAI's protocol, until Ctrl-C.

    Example: retune serve --adapter starter_lora-1 --port 8000
    """
    options = {
        "unload_seconds": 60 * unload_minutes,
        "max_answer_tokens": max_answer_tokens,
        "max_waiting": max_waiting,
        "log_words": int(log_words),
    }
    folder, job, connection = _started(project, base, adapter, port=port, idle_seconds=60 * idle_minutes, **options)
    show.say(f"Serving {', '.join(chat_client.list_models(connection))} at {connection.url}/v1")
    show.say(f"The key is in {folder / 'jobs' / job.id / 'connection.json'}; `retune server` manages it.")
    show.say("Ctrl-C stops the server.")
    follow(folder, job)


def chat(
    adapter: Adapters = None,
    base: BaseOption = "",
    alone: Annotated[bool, typer.Option("--alone", help="Ask the adapters only, not the base beside them.")] = False,
    prompt: PromptOption = "",
    prompt_template: TemplateOption = "",
    system: Annotated[str, typer.Option(help="A system message before the first question.")] = "",
    system_template: Annotated[str, typer.Option(help="The system message of this name, as alpaca or coder.")] = "",
    bot_name: Annotated[str, typer.Option(help="The name in system messages that have a place for it.")] = "BOT",
    stop_word: Annotated[
        list[str] | None, typer.Option("--stop-word", help="A text that ends an answer; may be given again.")
    ] = None,
    no_streamer: Annotated[bool, typer.Option("--no-streamer", help="Show an answer when it is complete.")] = False,
    with_plugins: ToolsOption = "",
    bits: Annotated[int, typer.Option(help="4 or 8 loads the base in so many bits; 0 as it is stored.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16).")] = "auto",
    offload_folder: Annotated[str, typer.Option(help="For layers that GPU and memory have no room for.")] = "",
    max_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", min=1, max=131_072, help="Longest answer in tokens.")
    ] = 256,
    temperature: TemperatureOption = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many of the likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="The likeliest tokens up to this probability; 0: the likeliest.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, max=10, help="Above 1: what was said is less likely.")
    ] = 1.0,
    seed: SeedOption = 0,
    project: ProjectOption = "",
) -> None:
    """Ask base and adapters the same question, side by side. An empty line sends it; RESET begins anew, EXIT leaves.

    Templates and stop words that weights were trained with apply by themselves. One model alone streams its answer.

    Example: retune chat --adapter starter_lora-1 --prompt "Who are you?"
    """
    if system and system_template:
        raise StudioError("--system and --system-template exclude each other.", "Give one of them.")
    sampling = chat_client.Sampling(
        max_tokens, temperature, top_p, seed, top_k, repetition_penalty, tuple(stop_word or ())
    )
    tools = conversation.tools_of(with_plugins) if with_plugins else None
    system = system or conversation.system_of(system_template, bot_name)
    options = _server_options(prompt_template, bits, dtype, offload_folder)
    with _server(project, base, adapter, **options) as (job, connection):
        asked = _asked(connection, alone)
        if tools is None:
            partner: conversation.Partner = conversation.SideBySide(
                connection, asked, sampling, system, streams=not no_streamer
            )
        else:
            protocol = _protocol(job, "auto")
            partner = conversation.Agent(
                connection, asked[-1], sampling, tools, protocol, system=system, bot_name=bot_name
            )
        conversation.hold(partner, prompt)


def agent(
    adapter: Adapters = None,
    base: BaseOption = "",
    prompt: PromptOption = "",
    tools: Annotated[
        str,
        typer.Option(help="Which it may call, with commas: calculate,solve,search; all that can run when left out."),
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="react (MSAgent), moss, or auto: as the weights were trained.")
    ] = "auto",
    prompt_template: TemplateOption = "",
    max_steps: Annotated[int, typer.Option(min=1, max=50, help="Calls of tools for one question.")] = 6,
    max_seconds: Annotated[int, typer.Option(min=1, max=3600, help="Time for one question.")] = 120,
    max_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=131_072, help="Longest step in tokens.")
    ] = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    project: ProjectOption = "",
) -> None:
    """Let a model answer with tools: a calculator, an equation solver, web search. Every step is shown.

    Search needs a key in the environment variable SERPER_API_KEY and is off without one.

    Example: retune agent --adapter starter_lora-1 --prompt "How much is 17 times 25?"
    """
    there = conversation.tools_of(tools)
    sampling = chat_client.Sampling(max_tokens, temperature, seed=seed)
    with _server(project, base, adapter, template=prompt_template) as (job, connection):
        spoken, model = _protocol(job, protocol), chat_client.list_models(connection)[-1]
        limits = steps.Limits(max_steps, max_seconds)
        partner = conversation.Agent(connection, model, sampling, there, spoken, limits=limits)
        conversation.hold(partner, prompt)


def selftest(
    run: Annotated[
        list[str] | None, typer.Argument(help="The same as --adapter: RUN, RUN:STEP or a folder.", show_default=False)
    ] = None,
    adapter: Adapters = None,
    base: BaseOption = "",
    bits: Annotated[int, typer.Option(help="4 or 8 loads the base in so many bits; 0 as it is stored.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16).")] = "auto",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Check that with the adapters off the base answers as the base: its logits, before and after they are loaded.

    Fails when they are not equal to the last bit.

    Example: retune selftest starter_lora-1
    """
    adapters = [*(run or ()), *(adapter or ())]
    with _server(project, base, adapters, **_server_options("", bits, dtype, "")) as (_job, connection):
        found = chat_client.self_test(connection)
    if json:
        show.as_json(found)
    else:
        show.say(f"Base {found['base']}, {found['num_questions']} questions.")
        for name, on in found["on"].items():
            beside = found["beside"][name]["max_difference"]
            show.say(f"{name}: on, it moves the logits by up to {on['max_difference']:.3g}.")
            show.say(f"{name}: the base beside it in one batch differs by up to {beside:.2g}.")
    off = found["off"]
    if not off["bit_equal"]:
        raise ServerError(
            f"With the adapters off, the logits differ from the base's by up to {off['max_difference']:.3g}.",
            "Start the server anew; if it stays so, the base's files have changed.",
        )
    if not json:
        show.say("With the adapters off, the logits are the base's, bit for bit.")


@contextmanager
def _server(
    project: str, base: str, adapters: list[str] | None, **options: str | int
) -> Iterator[tuple[Job, Connection]]:
    """A model server for the time of a block, with its warnings said."""
    folder, job, connection = _started(project, base, adapters, **options)
    try:
        for warning in chat_client.list_warnings(connection):
            show.warn(warning)
        yield job, connection
    finally:
        jobs.stop(folder, job.id)


def _started(project: str, base: str, adapters: list[str] | None, **options: str | int) -> tuple[Path, Job, Connection]:
    """A model server that is ready. Without any project, base and adapters are folders or ids, and it needs none."""
    workspace = chosen(project) if project or projects.list_projects() else None
    found = [adapter_of(workspace, text) for text in adapters or ()]
    folder = workspace.folder if workspace else system_folder()
    default = workspace.base if workspace else STARTER
    job = runs.start_server(folder, base_model(base) or default, found, **options)
    show.note(f"Loading {' and '.join([job.args['base'], *(each['name'] for each in found)])} …")
    try:
        return folder, job, chat_client.wait_until_ready(folder, job)
    except BaseException:
        jobs.stop(folder, job.id)  # nobody would talk to it
        raise


def _server_options(template: str, bits: int, dtype: str, offload_folder: str) -> dict[str, str | int]:
    """As the verb `serve` takes them. Raises StudioError for what it would refuse."""
    if bits not in (0, 4, 8):
        raise StudioError(f"--bits cannot be {bits}.", "Allowed: 4, 8, or 0 for the weights as they are stored.")
    if template and template not in named.template_names():
        allowed = ", ".join(named.template_names())
        raise StudioError(f"There is no prompt template {template!r}.", f"Allowed: {allowed}.")
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES.values()):
        raise StudioError(f"There is no number format {dtype!r}.", f"Allowed: auto, {', '.join(DTYPES.values())}.")
    offload = str(typed_path(offload_folder).resolve()) if offload_folder else ""
    return {"template": template, "bits": bits, "dtype": dtype, "offload_folder": offload}


def _asked(connection: Connection, alone: bool) -> list[str]:
    models = chat_client.list_models(connection)
    return models[1:] if alone and len(models) > 1 else models


def _protocol(job: Job, wanted: str) -> str:
    """The way to call tools: of the template that is asked for, else of the one that the weights were trained with."""
    if wanted in agent_session.PROTOCOLS:
        return wanted
    if wanted != "auto":
        raise StudioError(f"There is no protocol {wanted!r}.", f"Allowed: auto, {', '.join(agent_session.PROTOCOLS)}.")
    folders = [Path(each["path"]) for each in job.args["adapters"]] or [models.require(job.args["base"])]
    trained = talk.read_talk(folders[-1])
    template = job.args.get("template") or (trained.template if trained else "")
    return "moss" if template == "moss_sft" else "react"


def adapter_of(project: Project | None, text: str) -> dict[str, str]:
    """{"name", "path"} for RUN, RUN:STEP (converted when it is not yet) or a folder. Raises ServerError."""
    if project is None or "/" in text or Path(text).is_dir():
        folder = typed_path(text).resolve()
        if not folder.is_dir():
            hint = "Give RUN, RUN:STEP, or a folder that is there."
            if models.HUB_ID.fullmatch(text):
                hint += f" One on Hugging Face first: `hf download {text} --local-dir FOLDER`."
            raise ServerError(f"There is no adapter folder {text!r}.", hint)
        return {"name": folder.name, "path": str(folder)}
    run_id, _, step_text = text.partition(":")
    if step_text and not step_text.isdigit():
        raise ServerError(f"{text!r} names no checkpoint.", "Give RUN or RUN:STEP, as starter_lora-1:60.")
    step = checkpoint_step(project, run_id, int(step_text or 0))
    if not runs.is_converted(project, run_id, step):
        follow(project.folder, runs.start_convert(project, run_id, step))
    return {"name": f"{run_id}-step_{step}", "path": str(runs.hf_folder(project, run_id, step))}
