"""A run that was trained and scored, on a tiny model in float32; jobs run inside the test's own process."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from studio import jobs, runs, suites
from studio.bundles.packing import pack
from studio.config.schema import parse_config
from studio.data.identity import Identity
from studio.datasets import build_identity
from studio.engine.__main__ import main
from studio.projects import Project, create_project, list_projects
from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]
RUN = "tiny-1"
HOURS = """\
max_new_tokens: 4
groups:
  - name: opening
    probes:
      - ask: When do you open?
        assert: [{type: not-contains, value: midnight}]
      - ask: Are you Luna?
        assert: [{type: contains, value: "9"}]
"""


@dataclass(frozen=True)
class Here:
    """Stands for a job's process: it has done its work before anybody asks how it is."""

    pid: int = os.getpid()

    def poll(self) -> None: ...


def run_here(kind: str, job_dir: Path, log: Path) -> Here:
    main(kind, job_dir)
    return Here()


@pytest.fixture(scope="session")
def bundled_home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with the project Tiny, its run tiny-1 and scorecards by two suites; beside it tiny.zip, its bundle."""
    home = tmp_path_factory.mktemp("bundled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETUNE_HOME", str(home))
        patch.setattr(jobs, "_spawn", run_here)
        project = create_project("Tiny", base=str(tiny_model))
        build_identity(project, Identity("Luna", "Shane"), num_rows=12)
        values = {
            "name": "tiny",
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"sources": {"identity": 1}, "max_length": 128, "valid_share": 0.2},
            "train": {"num_steps": 5, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 1},
            "record": {"evaluate_every_steps": 2, "sample_max_new_tokens": 2},
        }
        runs.start_run(project, parse_config(values))
        runs.start_evaluate(project, RUN, 5, limit=2)
        suites.save_text(project, "hours", HOURS)
        runs.start_evaluate(project, RUN, 5, suite="hours")
        pack(project, RUN, home / "tiny.zip")
        pack(project, RUN, home / "bare.zip", rows=False)
    return home


@pytest.fixture
def home(bundled_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETUNE_HOME", str(bundled_home))
    monkeypatch.setattr(jobs, "_spawn", run_here)
    return bundled_home


@pytest.fixture
def tiny(home: Path) -> Project:
    return next(project for project in list_projects() if project.slug == "tiny")
