"""The `lm_eval` verb on tiny weights, where lm-evaluation-harness is installed (`pip install "retune[lm-eval]"`)."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from studio import harness
from studio.config.schema import RunConfig
from studio.engine.__main__ import main
from studio.engine.harness import _result
from studio.paths import atomic_write_json
from studio.projects import Project
from studio.store import jobs, open_db
from studio.store.jobs import Job
from tests.engine.conftest import add_run, train_here
from tests.test_harness import COMMON, folder  # noqa: F401

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
SAYS = COMMON + (
    "task: says\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 2, do_sample: false}\n'
    "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
)
BREAKS_OUT = "{{question.__class__.__mro__}}"


def asked(project: Project, run_id: str, base: str, tasks: Path) -> Job:
    args = {"base": base, "run_id": run_id, "step": 6, "tasks": str(tasks), "limit": 0}
    job = Job(kind="lm_eval", run_id=run_id, args=args)
    job_dir = project.path("jobs", job.id)
    job_dir.mkdir(parents=True)
    values = {"id": job.id, "kind": "lm_eval", "folder": str(project.folder), "args": args}
    atomic_write_json(job_dir / "job.json", values)
    with open_db(project.folder) as db:
        jobs.add(db, job)
    main("lm_eval", job_dir)
    with open_db(project.folder) as db:
        return jobs.get(db, job.id)


@needs_harness
def test_base_and_adapter_answer_local_tasks(
    training_project: Project, tiny_config: Callable[..., RunConfig], tiny_model: Path, folder: Path,  # noqa: F811
) -> None:  # fmt: skip
    (folder / "says.yaml").write_text(SAYS)
    run_id = add_run(training_project, tiny_config())
    train_here(training_project, run_id)
    ended = asked(training_project, run_id, str(tiny_model), folder)
    assert ended.state == "finished", ended.cause
    acc, said = harness.results(training_project, [run_id])
    assert (acc.task, acc.metric, acc.num_rows, acc.step) == ("even", "acc", 6, 6)
    assert (said.task, said.metric) == ("says", "exact_match")
    assert 0 <= acc.base[0] <= 1 and acc.change[0] == pytest.approx(acc.tuned[0] - acc.base[0])
    assert training_project.path(ended.result["path"]).is_file()

    (folder / "says.yaml").write_text(SAYS.replace("{{question}}", BREAKS_OUT))
    ended = asked(training_project, run_id, str(tiny_model), folder)
    assert ended.state == "failed" and "access to attribute '__class__' of 'str' object is unsafe" in ended.cause


def test_each_filter_of_a_task_has_the_marks_of_its_own_answers() -> None:
    values = {"alias": "sums", "sample_len": 2, "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5,
              "exact_match,loose": 1.0, "exact_match_stderr,loose": "N/A"}  # fmt: skip
    marks = [("strict", 0.0), ("strict", 1.0), ("loose", 1.0), ("loose", 1.0)]
    samples = [{"filter": name, "exact_match": mark} for name, mark in marks]
    assert _result(values, samples) == {
        "num_rows": 2,
        "metrics": {
            "exact_match (strict)": {"value": 0.5, "stderr": 0.5, "marks": [0.0, 1.0]},
            "exact_match (loose)": {"value": 1.0, "stderr": None, "marks": [1.0, 1.0]},
        },
    }
