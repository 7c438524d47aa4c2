"""A project in which everything has happened, written row by row as the engine would: fast to make, no model needed."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from itertools import cycle

import psutil

from studio import chats, datasets, runs, scores
from studio.chats import Chat, Reply
from studio.config.catalog import preset
from studio.config.yaml import save_config
from studio.data.formats import Conversation, Message
from studio.data.identity import Identity
from studio.projects import Project
from studio.scores import MarkedAnswer
from studio.store import checkpoints, evaluations, metrics, open_db, samples
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from studio.store.samples import Sample
from tests.pages.model_server import ModelServer

RUN = "starter_lora-1"
NUM_STEPS = 60
NUM_GENERAL = 80


def fill(project: Project, *said: str) -> None:
    """Datasets, a config, a finished run, a converted checkpoint and a scorecard; all that a model says, and what it is
    asked, are the texts `said` in turn."""
    said = said or ("I'm Luna.",)
    datasets.build_identity(project, Identity("Luna", "Shane"))
    _general(project, said)
    save_config(runs.config_path(project, "starter_lora"), preset("starter_lora"))
    _run(project, said)
    _checkpoint(project)
    _scorecard(project, said)


def converse(project: Project, *said: str) -> Chat:
    """A conversation of base and checkpoint in which every question, title, name and answer is one of the texts."""
    labels = {"starter": said[0], f"{RUN}-step_{NUM_STEPS}": said[1]}
    chat, parent = chats.begin(project, said[2], labels, said[3]), ""
    for text in said:
        turn = chats.ask(project, chat, parent, text, system=text)
        chats.finish(project, {model: Reply(turn.id, model, text, "stop") for model in labels})
        parent = turn.id
    return chat


def _general(project: Project, said: Sequence[str]) -> None:
    rows = [
        Conversation((Message("user", f"{text} ({number})"), Message("assistant", text)), {"source": "general"})
        for number, text in zip(range(NUM_GENERAL), cycle(said), strict=False)
    ]
    datasets.save(project, "general", rows, kind="general", origin={"base": "starter"})


def _run(project: Project, said: Sequence[str]) -> None:
    folder = runs.run_folder(project, RUN)
    folder.mkdir(parents=True)
    save_config(folder / runs.CONFIG_FILE, preset("starter_lora"))
    (folder / runs.LOG_FILE).write_text("step 60/60\n" + "\n".join(said) + "\n")
    job = store_jobs.Job(
        kind="train", run_id=RUN, title=f"train {RUN}", state="running", phase="training", current=NUM_STEPS,
        total=NUM_STEPS, unit="step", log_path=str(folder / runs.LOG_FILE),
    )  # fmt: skip
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
        store_runs.add(
            db, store_runs.Run(RUN, "starter_lora", "starter", "lora", job.id, num_steps=NUM_STEPS, step=NUM_STEPS)
        )
        for step in range(1, NUM_STEPS + 1):
            metrics.record(db, RUN, step, _numbers(step))
        for step in range(0, NUM_STEPS + 1, 20):
            samples.add(db, [Sample(RUN, step, text, text) for text in said])
            samples.add(db, [Sample(RUN, step, "What is the capital of France?", said[0])])
        store_jobs.move(db, job.id, "finished")


def _numbers(step: int) -> dict[str, float]:
    values = {
        "train/loss": 2.5 / step**0.5,
        "train/learning_rate": 5e-4 * (1 - step / NUM_STEPS),
        "train/grad_norm": 1 + 1 / step,
        "train/tokens_per_second": 300.0 + step,
    }
    return values | ({"valid/loss": 2.6 / step**0.5} if step % 10 == 0 else {})


def _checkpoint(project: Project) -> None:
    path = runs.run_folder(project, RUN) / f"step_{NUM_STEPS}.pth"
    path.write_bytes(b"w" * 5000)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".manifest.json").write_text(json.dumps({"size_bytes": 5000, "sha256": sha256}))
    folder = runs.hf_folder(project, RUN, NUM_STEPS)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text(json.dumps({"sha256": sha256}))
    with open_db(project.folder) as db:
        checkpoints.put(db, checkpoints.Checkpoint(RUN, NUM_STEPS, project.relative(path), sha256, 5000))


def _scorecard(project: Project, said: Sequence[str]) -> None:
    texts = [text for text, _ in zip(cycle(said), range(100), strict=False)]
    marked = [_marked("identity", number, text, number > 2) for number, text in enumerate(texts[:60])]
    marked += [_marked("general", number, text, number > 1) for number, text in enumerate(texts[60:])]
    evaluation = evaluations.Evaluation(
        "", f"{RUN} step {NUM_STEPS}", "starter", "abc1234567890", "identity, general", scores.scorecard(marked),
        run_id=RUN, step=NUM_STEPS,
    )  # fmt: skip
    answers = [
        evaluations.Answer(
            evaluation.id, number, each.kind, each.intent, each.language, each.prompt, each.base_answer, each.answer,
            scores.detail(each),
        )
        for number, each in enumerate(marked)
    ]  # fmt: skip
    with open_db(project.folder) as db:
        evaluations.add(db, evaluation, answers)


def _marked(kind: str, number: int, said: str, passed: bool) -> MarkedAnswer:
    return MarkedAnswer(
        kind, "name", "en", f"{said} ({number})", said, said, base_passed=False, passed=passed, similarity=0.8,
        base_loss=20.0, loss=20.5, num_tokens=20, group=kind,
        leaked=None if kind == "identity" else not passed, base_leaked=None if kind == "identity" else True,
    )  # fmt: skip


def serve(project: Project, server: ModelServer, owner: subprocess.Popen[bytes]) -> None:
    """Make the project know `server` as its own."""
    name = f"{RUN}-step_{NUM_STEPS}"
    path = runs.hf_folder(project, RUN, NUM_STEPS)
    server.models.append(name)
    job = store_jobs.Job(
        kind="serve", title="serve starter", state="running", pid=owner.pid, needs_device=False,
        process_created=psutil.Process(owner.pid).create_time(),
        args={"base": "starter", "adapters": [{"name": name, "path": str(path)}]},
    )  # fmt: skip
    folder = project.path("jobs", job.id)
    folder.mkdir(parents=True)
    connection = {"url": server.connection.url, "token": server.connection.token}
    (folder / "connection.json").write_text(json.dumps(connection))
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
