"""`retune chat` and `retune serve`: talk to base and tuned weights, in the shell or through an OpenAI-compatible server."""

import re
from typing import Annotated

import typer

from studio import chat_client, jobs, runs
from studio.cli import show
from studio.cli.options import ProjectOption, chosen
from studio.errors import ServerError
from studio.projects import Project
from studio.store import checkpoints, open_db
from studio.store.jobs import Job

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="RUN, RUN:STEP or an adapter folder; may be given again."),
]


def serve(
    adapter: Adapters = None,
    base: Annotated[str, typer.Option(help="Base model; the project's when left out.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    project: ProjectOption = "",
) -> None:
    """Serve base and adapters on 127.0.0.1, in OpenAI's protocol, until Ctrl-C."""
    workspace = chosen(project)
    job, connection = _started(workspace, base, adapter or [], port)
    show.say(f"Serving {', '.join(chat_client.list_models(connection))} at {connection.url}/v1")
    show.say(f"The token is in {workspace.path('jobs', job.id, 'connection.json')}. Ctrl-C stops the server.")
    show.follow(workspace.folder, job)


def chat(
    adapter: Adapters = None,
    base: Annotated[str, typer.Option(help="Base model; the project's when left out.")] = "",
    prompt: Annotated[str, typer.Option(help="Ask this once and leave, instead of a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    project: ProjectOption = "",
) -> None:
    """Ask base and adapters the same question, side by side. An empty line ends the conversation."""
    workspace = chosen(project)
    job, connection = _started(workspace, base, adapter or [], 0)
    sampling = chat_client.Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    histories: dict[str, list[dict[str, str]]] = {model: [] for model in chat_client.list_models(connection)}
    try:
        while question := prompt or show.out.input("[bold]you[/bold] ").strip():
            _ask(connection, histories, question, sampling)
            if prompt:
                break
    except (EOFError, KeyboardInterrupt):
        show.say("")
    finally:
        jobs.stop(workspace.folder, job.id)


def _ask(
    connection: chat_client.Connection,
    histories: dict[str, list[dict[str, str]]],
    question: str,
    sampling: "chat_client.Sampling",
) -> None:
    for model, messages in histories.items():
        messages.append({"role": "user", "content": question})
        answer = chat_client.chat(connection, model, messages, sampling)
        messages.append({"role": "assistant", "content": answer})
        show.out.print(f"[bold]{model}[/bold]", end=" ")
        show.say(answer)


def _started(project: Project, base: str, adapters: list[str], port: int) -> tuple[Job, chat_client.Connection]:
    chosen_adapters = [_adapter(project, text) for text in adapters]
    job = runs.start_server(project, base or project.base, chosen_adapters, port)
    return job, chat_client.wait_until_ready(project.folder, job)


def _adapter(project: Project, text: str) -> dict[str, str]:
    """{"name", "path"} for RUN, RUN:STEP (converted when it is not yet) or a folder."""
    if "/" in text:
        folder = re.sub(r"/+$", "", text)
        return {"name": folder.rsplit("/", 1)[-1], "path": folder}
    run_id, _, step_text = text.partition(":")
    with open_db(project.folder) as db:
        steps = [c.step for c in checkpoints.listed(db, run_id)]
    if not steps or (step_text and not step_text.isdigit()):
        raise ServerError(f"Run {run_id!r} has no checkpoint to chat with.", "`retune runs list` shows the runs.")
    step = int(step_text or max(steps))
    if not runs.is_converted(project, run_id, step):
        show.follow(project.folder, runs.start_convert(project, run_id, step))
    return {"name": f"{run_id}-step_{step}", "path": str(runs.hf_folder(project, run_id, step))}
