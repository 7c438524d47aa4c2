"""What `retune demo` reuses of a project, and what it says of a merge."""

from collections.abc import Callable

import pytest

from studio import conversions, datasets, jobs
from studio.cli import demo, weights
from studio.config import catalog
from studio.config.yaml import with_settings
from studio.data.formats import Conversation, Message
from studio.data.identity import Identity
from studio.projects import Project
from studio.store.jobs import Job

ROW = Conversation((Message("user", "1+1?"), Message("assistant", "2")))


@pytest.fixture
def distilled(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """`distilled(limit=4)`: what the demo has asked a base model for by then, as the job would store it."""
    asked: list[dict] = []

    def answer(project: Project, limit: int, base: str) -> Job:
        asked.append({"base": base, "limit": limit})
        datasets.save(project, "general", [ROW], kind="general", origin=asked[-1])
        return Job("distill")

    monkeypatch.setattr(datasets, "start_distill", answer)
    monkeypatch.setattr(demo, "follow", lambda folder, job: job)

    def build(base: str = "starter", limit: int = 0) -> list[dict]:
        config = with_settings(catalog.preset("starter_lora"), [f"model.base={base}"])
        demo._data(project, config, Identity("Luna", "Shane"), 0, False, limit)
        return asked

    return build


def test_general_answers_are_kept_for_the_same_base_and_number(distilled: Callable[..., list[dict]]) -> None:
    for _ in range(2):
        assert distilled(limit=4) == [{"base": "starter", "limit": 4}]


@pytest.mark.parametrize("then", [{"limit": 0}, {"limit": 8}, {"base": "/other", "limit": 4}])
def test_a_quick_look_or_another_base_is_no_reason_to_reuse(
    distilled: Callable[..., list[dict]], then: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled(limit=4)
    assert distilled(**then)[1:] == [{"base": "starter", **then}]
    assert "made again" in capsys.readouterr().out


def test_what_a_person_imported_is_taken_as_it_is(project: Project, distilled: Callable[..., list[dict]]) -> None:
    datasets.save(project, "general", [ROW], kind="import", origin={"file": "mine.jsonl"})
    assert distilled() == []


@pytest.mark.parametrize(("verified", "start"), [(True, "Verified"), (False, "Warning: Not verified")])
def test_the_verdict_on_a_merge_is_said(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verified: bool, start: str
) -> None:
    said = "Verified: fine." if verified else "Not verified: use both."
    ended = Job("merge", state="finished", result={"verified": verified, "message": said})
    monkeypatch.setattr(jobs, "start", lambda *args, **more: ended)
    monkeypatch.setattr(conversions, "check", lambda *args: None)
    for module in (demo, weights):
        monkeypatch.setattr(module, "follow", lambda folder, job: ended)
    monkeypatch.setattr("studio.runs.start_convert", lambda *args: ended)
    monkeypatch.setattr("studio.runs.start_merge", lambda *args: ended)
    weights.merge("starter", project.folder, project.folder / "out")
    demo._convert_and_merge(project, "lora-1", 4)
    assert sum(line.startswith(start) for line in capsys.readouterr().out.splitlines()) == 2
