"""The dry run: a real step in a job, remembered for its config and machine; and forecasts held against runs."""

import json
import signal
from collections.abc import Callable

import psutil
import pytest

from studio import forecast
from studio.config.schema import RunConfig
from studio.engine import devices
from studio.engine.__main__ import main
from studio.errors import DataError
from studio.estimate import longest_load
from studio.machine import cpu
from studio.paths import atomic_write_json
from studio.projects import Project
from studio.store import jobs, metrics, open_db, runs
from studio.store.jobs import Job
from tests.engine.conftest import add_run, train_here

Config = Callable[..., RunConfig]


def measure_here(project: Project, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Job:
    """`forecast.start_measuring`, with the job run in this process."""

    def start(folder, kind, args, title):
        job = Job(kind=kind, title=title, args=args)
        job_dir = project.path("jobs", job.id)
        job_dir.mkdir(parents=True)
        atomic_write_json(job_dir / "job.json", {"id": job.id, "kind": kind, "folder": str(folder), "args": args})
        with open_db(folder) as db:
            jobs.add(db, job)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            main(kind, job_dir)
        finally:
            signal.signal(signal.SIGTERM, handler)
        with open_db(folder) as db:
            return jobs.get(db, job.id)

    monkeypatch.setattr(forecast.jobs, "start", start)
    return forecast.start_measuring(project, config)


def test_a_dry_run_is_remembered_for_its_config(
    training_project: Project, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    assert forecast.forecast(training_project, config).pace is None
    job = measure_here(training_project, config, monkeypatch)
    assert job.state == "finished", job.cause
    pace = forecast.forecast(training_project, config).pace
    assert pace and pace.is_measured and pace.seconds_per_step == job.result["seconds_per_step"] > 0
    assert pace.memory_bytes == job.result["memory_bytes"] > 100 * 2**20
    longer = tiny_config(**{"train.num_steps": 600})
    assert forecast.newest_measurement(training_project, longer) is not None  # its steps are the same
    wider = tiny_config(**{"lora": {"rank": 8, "alpha": 8}})
    assert forecast.newest_measurement(training_project, wider) is None
    assert not list(training_project.path("runs").glob("*"))


def test_the_load_is_counted_once_the_data_is_tokenised(
    training_project: Project, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"data.pack": "none"})
    assert forecast.load_of(None, config, cpu()) == longest_load(config, cpu())
    before = forecast.load_of(training_project, config, cpu())
    measure_here(training_project, config, monkeypatch)
    load = forecast.load_of(training_project, config, cpu())
    assert load.basis == "counted" and load.rows == 1 and load.longest < 128 and load.width <= 2 * load.longest
    assert 4 <= load.tokens_per_step <= 4 * load.longest
    assert before.basis == "drawn" and before.longest < 128
    assert before.tokens_per_step == pytest.approx(load.tokens_per_step, rel=0.2)
    wider = tiny_config(**{"data.pack": "none", "train.micro_batch_size": 4})
    larger = forecast.load_of(training_project, wider, cpu())
    assert larger.num_tokens > load.num_tokens
    for file in training_project.path("cache").glob("*/ids.bin"):
        file.unlink()
    forecast._counted.cache_clear()
    assert forecast.load_of(training_project, config, cpu()) == before


def cannot_be_drawn(*_settings: object) -> None:
    raise DataError("Raw text.")


def test_a_finished_run_tells_how_fast_the_next_one_is_and_how_right_its_forecast_was(
    training_project: Project, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**{"train.num_steps": 3, "record.sample_every_steps": 0})
    run_id = add_run(training_project, config)
    with open_db(training_project.folder) as db:
        runs.update(db, run_id, detail_json=json.dumps({"predicted": forecast.prediction(training_project, config)}))
        assert forecast.outcome(training_project, runs.get(db, run_id)) is None
    assert train_here(training_project, run_id).state == "finished"
    with open_db(training_project.folder) as db:
        found = forecast.outcome(training_project, runs.get(db, run_id))
        seconds = [point.value for point in metrics.series(db, run_id, "train/step_seconds")]
        speeds = [point.value for point in metrics.series(db, run_id, "train/tokens_per_second")]
    assert found and found.measured_seconds == sorted(seconds)[1]
    assert found.measured_bytes >= devices.peak_resident_bytes() * 0.5
    assert found.memory_error == found.predicted_bytes / found.measured_bytes - 1
    assert found.time_error is None  # nobody knew how fast it would be
    pace = forecast.forecast(training_project, config).pace
    assert pace and not pace.is_measured and pace.source == run_id
    uncounted = tiny_config(**{"data.max_length": 500, "train.micro_batch_size": 4})
    made = forecast.forecast(training_project, uncounted)
    assert made.load.basis == "drawn" and made.pace.seconds_per_step == made.load.tokens_per_step / sorted(speeds)[1]
    monkeypatch.setattr(forecast, "_judged", cannot_be_drawn)
    assert forecast.forecast(training_project, uncounted).pace.seconds_per_step == 2 * found.measured_seconds
    spread = {"distributed.strategy": "ddp", "distributed.processes_per_node": 2}
    for other in (tiny_config(method="full"), tiny_config(**spread)):
        assert forecast.forecast(training_project, other).pace is None


def test_the_peak_is_remembered_after_memory_was_given_back() -> None:
    held = bytearray(b"x" * (300 * 2**20))
    then = psutil.Process().memory_info().rss
    del held
    assert devices.peak_resident_bytes() > 0.99 * then > psutil.Process().memory_info().rss + 200 * 2**20
