"""`retune chat` and `retune serve`: talk to base and tuned weights, in the shell or in OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.lazy import chat_client, jobs, runs
from studio.cli.options import ProjectOption, base_model, checkpoint_step, chosen
from studio.errors import ServerError

if TYPE_CHECKING:
    from studio.chat_client import Connection, Sampling
    from studio.projects import Project
    from studio.store.jobs import Job

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="RUN, RUN:STEP or an adapter folder; may be given again."),
]
BaseOption = Annotated[str, typer.Option(help="Base model; the project's when left out.")]


def serve(
    adapter: Adapters = None,
    base: BaseOption = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    idle_minutes: Annotated[int, typer.Option(min=0, help="Stop after this long without a request; 0 never.")] = 0,
    project: ProjectOption = "",
) -> None:
    """Serve base and adapters on 127.0.0.1, in OpenAI's protocol, until Ctrl-C.

    Example: retune serve --adapter starter_lora-1 --port 8000
    """
    workspace = chosen(project)
    job, connection = _started(workspace, base, adapter or [], port, 60 * idle_minutes)
    show.say(f"Serving {', '.join(chat_client.list_models(connection))} at {connection.url}/v1")
    show.say(f"The token is in {workspace.path('jobs', job.id, 'connection.json')}. Ctrl-C stops the server.")
    follow(workspace.folder, job)


def chat(
    adapter: Adapters = None,
    base: BaseOption = "",
    prompt: Annotated[str, typer.Option(help="Ask this once and leave, instead of a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")] = 0,
    project: ProjectOption = "",
) -> None:
    """Ask base and adapters the same question, side by side. An empty line ends the conversation.

    Example: retune chat --adapter starter_lora-1 --prompt "Who are you?"
    """
    workspace = chosen(project)
    job, connection = _started(workspace, base, adapter or [])
    try:
        _converse(connection, prompt, chat_client.Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed))
    except (EOFError, KeyboardInterrupt):
        show.say("")
    finally:
        jobs.stop(workspace.folder, job.id)


def _converse(connection: Connection, prompt: str, sampling: Sampling) -> None:
    histories: dict[str, list[dict[str, str]]] = {model: [] for model in chat_client.list_models(connection)}
    while question := prompt or show.out.input("[bold]you[/bold] ").strip():
        _ask(connection, histories, question, sampling)
        if prompt:
            return


def _ask(connection: Connection, histories: dict[str, list[dict[str, str]]], question: str, sampling: Sampling) -> None:
    """All models answer at once; each answer is shown when it is complete, with the hash of its weights."""
    columns = []
    for model, messages in histories.items():
        messages.append({"role": "user", "content": question})
        columns.append(chat_client.Column(model, messages))
    answers, weights = [""] * len(columns), [""] * len(columns)
    for event in chat_client.stream_compare(connection, columns, sampling):
        answers[event.column] += event.delta
        weights[event.column] = event.weights or weights[event.column]
        if event.finish_reason:
            model, answer = columns[event.column].model, answers[event.column]
            histories[model].append({"role": "assistant", "content": answer})
            show.out.print(show.plain(f"{model}  weights {weights[event.column][:12]}"), style="bold", highlight=False)
            show.say(f"  {event.error or answer}")


def _started(
    project: Project, base: str, adapters: list[str], port: int = 0, idle_seconds: int = 1800
) -> tuple[Job, Connection]:
    found = [_adapter(project, text) for text in adapters]
    job = runs.start_server(project, base_model(base) or project.base, found, port, idle_seconds)
    try:
        return job, chat_client.wait_until_ready(project.folder, job)
    except BaseException:
        jobs.stop(project.folder, job.id)  # nobody would talk to it
        raise


def _adapter(project: Project, text: str) -> dict[str, str]:
    """{"name", "path"} for RUN, RUN:STEP (converted when it is not yet) or a folder. Raises ServerError."""
    if "/" in text or Path(text).is_dir():
        folder = Path(text).expanduser().resolve()
        if not folder.is_dir():
            raise ServerError(f"There is no adapter folder {text!r}.", "Give RUN, RUN:STEP, or a folder that is there.")
        return {"name": folder.name, "path": str(folder)}
    run_id, _, step_text = text.partition(":")
    if step_text and not step_text.isdigit():
        raise ServerError(f"{text!r} names no checkpoint.", "Give RUN or RUN:STEP, as starter_lora-1:60.")
    step = checkpoint_step(project, run_id, int(step_text or 0))
    if not runs.is_converted(project, run_id, step):
        follow(project.folder, runs.start_convert(project, run_id, step))
    return {"name": f"{run_id}-step_{step}", "path": str(runs.hf_folder(project, run_id, step))}
