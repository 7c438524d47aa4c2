"""`retune server`: the model servers that run in a project: what is loaded, who asked, adapters in and out, the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import chat as chat_commands
from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import chat_client, jobs, request_log, server_key
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import ServerError
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.projects import Project
    from studio.store.jobs import Job

app = group("A project's running model server: what is loaded, who asked, adapters in and out, the key.")


@app.command()
def status(project: ProjectOption = "", json: JsonOption = False) -> None:
    """Say where it answers, what is loaded, and how much it has to do.

    Example: retune server status
    """
    workspace, job = _server(project)
    connection = chat_client.wait_until_ready(workspace.folder, job)
    found = chat_client.status(connection)
    if json:
        return show.as_json({"url": connection.url, "job": job.id, **vars(found)})
    weights = human_bytes(found.memory_bytes) if found.loaded else "weights not loaded"
    show.say(f"{connection.url}/v1: {weights}, {found.num_asked} answered, {found.num_answering} being answered, "
             f"{found.num_waiting} waiting")  # fmt: skip
    rows = [[model.name, model.kind, model.weights[:12], " ".join(model.warnings)] for model in found.models]
    return show.table(["model", "kind", "weights", "warnings"], rows)


@app.command()
def load(
    adapter: Annotated[str, typer.Argument(help="RUN, RUN:STEP or an adapter folder inside the project.")],
    project: ProjectOption = "",
) -> None:
    """Put an adapter on the running server; a checkpoint is converted first when it is not yet.

    Example: retune server load starter_lora-1:40
    """
    workspace, job = _server(project)
    found = chat_commands.adapter_of(workspace, adapter)
    digest = chat_client.add_adapter(chat_client.wait_until_ready(workspace.folder, job), found["name"], found["path"])
    show.say(f"{found['name']}: loaded, weights {digest[:12]}")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="As `retune server status` names it.")], project: ProjectOption = ""
) -> None:
    """Take an adapter out of the running server. What it answers just now ends with an error.

    Example: retune server remove starter_lora-1-step_40
    """
    workspace, job = _server(project)
    chat_client.remove_adapter(chat_client.wait_until_ready(workspace.folder, job), name)
    show.say(f"{name}: taken out")


@app.command()
def unload(project: ProjectOption = "") -> None:
    """Let the server go of its weights; the next request loads them again.

    Example: retune server unload
    """
    workspace, job = _server(project)
    done = chat_client.unload(chat_client.wait_until_ready(workspace.folder, job))
    show.say("The weights are out of memory." if done else "It is answering, or they were not in memory.")


@app.command()
def log(
    limit: Annotated[int, typer.Option(min=1, help="So many of the last requests.")] = 20,
    project: ProjectOption = "",
    json: JsonOption = False,
) -> None:
    """List who asked, when, how many tokens, how long, and how it ended; of the newest server, running or not.

    Example: retune server log --limit 50
    """
    workspace = chosen(project)
    servers = [job for job in jobs.refresh(workspace.folder) if job.kind == "serve"]
    found = request_log.read(workspace.path("jobs", servers[0].id), limit) if servers else []
    if json:
        return show.as_json([vars(asked) for asked in found])
    if not found:
        return show.say("Nobody asked yet.")
    rows = [
        [each.at, each.who, each.model, each.prompt_tokens, each.answer_tokens, each.seconds, each.error or each.end]
        for each in found
    ]
    return show.table(["at", "who", "model", "prompt", "answer", "seconds", "end"], rows)


@app.command()
def key(
    own: Annotated[bool, typer.Option("--own", help="Type a key of your own, for servers that start later.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Let each server make its own again.")] = False,
    project: ProjectOption = "",
) -> None:
    """Print the key of the running server, or set one of your own. It is never taken from the command line.

    Example: retune server key
    """
    if forget:
        server_key.set_own_key("")
        return show.say("Servers that start from now on make a key each.")
    if own:
        server_key.set_own_key(typer.prompt("Key", hide_input=True))
        return show.say("Servers that start from now on take your key.")
    workspace, job = _server(project)
    return typer.echo(chat_client.wait_until_ready(workspace.folder, job).token)


def _server(project: str) -> tuple[Project, Job]:
    """The newest model server of a project that runs. Raises ServerError when there is none."""
    workspace = chosen(project)
    found = [job for job in jobs.refresh(workspace.folder) if job.kind == "serve" and job.live]
    if not found:
        raise ServerError(f"No model server runs in {workspace.slug}.", "Start one: `retune serve`.")
    return workspace, found[0]
