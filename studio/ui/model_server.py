"""Getting a model server ready from a page: convert what is not converted, then reuse a live server or start one.

Each step is a job, so a page may be left and come back to; `prepare` looks where things stand and does the next step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from studio import chat_client, jobs, runs
from studio.chat_client import Connection
from studio.data.talk import WEIGHTS_FILE
from studio.projects import Project
from studio.store import checkpoints, open_db
from studio.store import runs as store_runs
from studio.store.jobs import Job
from studio.ui.i18n import _
from studio.ui.job_panel import newest_job


@dataclass(frozen=True)
class Pick:
    """A checkpoint that someone wants to talk to or score; with `merged`, the merged model of that name."""

    run_id: str
    step: int
    merged: str = ""

    @property
    def name(self) -> str:
        """Its name on the model server."""
        return f"merged/{self.merged}" if self.merged else f"{self.run_id}-step_{self.step}"

    @property
    def label(self) -> str:
        if self.merged:
            return f"{self.merged} · {_('merged')}"
        return f"{self.run_id} · {_('step {step}').format(step=self.step)}"

    def folder(self, project: Project) -> Path:
        """Where its weights lie, or will lie when they are converted."""
        if self.merged:
            return project.path("merged", self.merged)
        return runs.hf_folder(project, self.run_id, self.step)


@dataclass(frozen=True)
class Standing:
    """Where things stand: a connection when ready, else the job that is under way or that failed."""

    connection: Connection | None = None
    job: Job | None = None

    @property
    def failed(self) -> bool:
        return self.connection is None and self.job is not None and not self.job.live


def picks_of(project: Project, base: str = "") -> list[Pick]:
    """Every checkpoint of the project (of runs on `base`, when given), newest first."""
    with open_db(project.folder) as db:
        bases = {run.id: run.base for run in store_runs.listed(db)}
        found = checkpoints.listed(db)
    return [Pick(each.run_id, each.step) for each in found if not base or bases.get(each.run_id, base) == base]


def merged_of(project: Project, base: str) -> list[Pick]:
    """Merged models of the project that were made from this base, newest first."""
    with open_db(project.folder) as db:
        bases = {run.id: run.base for run in store_runs.listed(db)}
        found = checkpoints.outputs(db, "merged")
    picks = [Pick(each.run_id, each.step, Path(each.path).name) for each in found if bases.get(each.run_id) == base]
    return [pick for pick in dict.fromkeys(picks) if (pick.folder(project) / WEIGHTS_FILE).is_file()]


def bases_of(project: Project) -> list[str]:
    """The base models that the project has checkpoints of, the newest run's first."""
    with open_db(project.folder) as db:
        with_checkpoints = {each.run_id for each in checkpoints.listed(db)}
        return list(dict.fromkeys(run.base for run in store_runs.listed(db) if run.id in with_checkpoints))


def convert_next(project: Project, picks: Sequence[Pick], attempt: set[str]) -> Job | None:
    """The job that converts the first of these that is not converted; None when all are.

    `attempt` holds the jobs of this try: one that failed within it is returned, not started again.
    """
    for pick in picks:
        if pick.merged or runs.is_converted(project, pick.run_id, pick.step):
            continue
        job = newest_job(project.folder, "convert", run_id=pick.run_id, step=pick.step)
        if job is None or (not job.live and job.id not in attempt):
            job = runs.start_convert(project, pick.run_id, pick.step)
        attempt.add(job.id)
        return job
    return None


def prepare(project: Project, base: str, picks: Sequence[Pick], attempt: set[str], bits: int = 0) -> Standing:
    """Do the next step towards a server with `base` (in 4 or 8 `bits`, 0: as stored) and `picks`, and say where things
    stand.

    A live server of the same base and bits is used again: weights that it has not loaded yet are added to it.
    """
    if job := convert_next(project, picks, attempt):
        return Standing(job=job)
    server = live_server(project, base, bits) or next((job for job in servers(project) if job.id in attempt), None)
    if server is None:
        server = runs.start_server(
            project.folder, base, adapters_of(project, picks), **({"bits": bits} if bits else {})
        )
    attempt.add(server.id)
    connection = runs.server_connection(project, server) if server.live else None
    if connection:
        _add_missing(project, connection, picks)
    return Standing(connection, server)


def _add_missing(project: Project, connection: Connection, picks: Sequence[Pick]) -> None:
    loaded = chat_client.list_models(connection)
    add_adapters(project, connection, [pick for pick in picks if pick.name not in loaded])


def add_adapters(project: Project, connection: Connection, picks: Sequence[Pick]) -> None:
    """Load the weights of these into a running server."""
    for adapter in adapters_of(project, picks):
        chat_client.add_adapter(connection, adapter["name"], adapter["path"])


def adapters_of(project: Project, picks: Sequence[Pick]) -> list[dict[str, str]]:
    """What `runs.start_server` wants to know of each."""
    return [{"name": pick.name, "path": str(pick.folder(project))} for pick in picks]


def servers(project: Project) -> list[Job]:
    """Model servers of the project, newest first."""
    return [job for job in jobs.refresh(project.folder) if job.kind == "serve"]


def live_server(project: Project, base: str, bits: int | None = None) -> Job | None:
    """A server of this base that runs or is being loaded; with `bits`, one that has it in so many."""
    live = (job for job in servers(project) if job.state in ("queued", "running") and job.args.get("base") == base)
    return next((job for job in live if bits in (None, int(job.args.get("bits") or 0))), None)
