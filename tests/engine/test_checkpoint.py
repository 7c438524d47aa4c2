"""Checkpoints are written whole or not at all, verified, rotated, and found again."""

import json
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from studio import faults
from studio.engine import checkpoint
from studio.engine.checkpoint import CheckpointFolder, find_resumable, load_checkpoint, verify
from studio.errors import CheckpointError, DiskFullError, StoreBusyError
from studio.projects import Project
from studio.store import checkpoints, open_db


def content(step: int, num_weights: int = 50_000) -> dict[str, Any]:
    return {"meta": {"format": checkpoint.FORMAT, "step": step}, "state_dict": {"w": torch.full((num_weights,), step)}}


@pytest.fixture
def folder(project: Project) -> CheckpointFolder:
    run_dir = project.path("runs", "tiny-1")
    run_dir.mkdir(parents=True)
    return CheckpointFolder(project.folder, "tiny-1", run_dir, keep_last=2)


def steps_in_db(project: Project) -> list[int]:
    with open_db(project.folder) as db:
        return sorted(each.step for each in checkpoints.listed(db, "tiny-1"))


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.run_dir.iterdir())


def test_a_saved_checkpoint_verifies_loads_and_is_registered(project: Project, folder: CheckpointFolder) -> None:
    path = folder.save(5, content(5))
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.full((50_000,), 5))
    assert names(folder) == ["last_checkpoint", "step_5.manifest.json", "step_5.pth"]
    assert (folder.run_dir / "last_checkpoint").read_text().strip() == "step_5.pth"
    manifest = verify(path)
    assert manifest["step"] == 5 and manifest["versions"]["torch"] == torch.__version__
    with open_db(project.folder) as db:
        row = checkpoints.get(db, "tiny-1", 5)
    assert (row.path, row.sha256, row.size_bytes) == ("runs/tiny-1/step_5.pth", manifest["sha256"], path.stat().st_size)


def test_the_oldest_beyond_keep_last_go(project: Project, folder: CheckpointFolder) -> None:
    for step in (9, 10, 11):
        folder.save(step, content(step))
    assert steps_in_db(project) == [10, 11]
    assert [path.name for _, path in checkpoint.listed(folder.run_dir)] == ["step_11.pth", "step_10.pth"]


def test_the_best_stays_while_a_better_one_could_not_be_saved(project: Project, folder: CheckpointFolder) -> None:
    """As on a disk that was full when it was due: there is no step 3."""
    folder.save(2, content(2), keep=(2,))
    folder.mark_best(2, "valid_loss", 1.5)
    for step in (4, 6, 8):
        folder.save(step, content(step), keep=(3,))
        folder.mark_best(3, "valid_loss", 1.0)
    assert steps_in_db(project) == [2, 6, 8]
    with open_db(project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, "tiny-1") if each.is_best] == [2]
    folder.save(9, content(9), keep=(9,))
    assert steps_in_db(project) == [8, 9]


def test_rotation_never_takes_the_one_just_saved(project: Project, folder: CheckpointFolder) -> None:
    """Resumed from an early step, the newest by time is the oldest by number."""
    for step in (20, 30, 5):
        folder.save(step, content(step))
    assert steps_in_db(project) == [5, 30]


def test_going_on_from_an_earlier_one_gives_up_the_later_ones(project: Project, folder: CheckpointFolder) -> None:
    earlier = folder.save(5, content(5))
    folder.save(10, content(10))
    with open_db(project.folder) as db:
        checkpoints.put(db, checkpoints.Checkpoint("tiny-1", 15, "runs/tiny-1/step_15.pth", "0" * 64, 1))
        checkpoints.put(db, checkpoints.Checkpoint("tiny-2", 15, "runs/tiny-2/step_15.pth", "0" * 64, 1))
    folder.go_on_from(5, earlier)
    assert names(folder) == ["last_checkpoint", "step_5.manifest.json", "step_5.pth"]
    assert (folder.run_dir / "last_checkpoint").read_text().strip() == "step_5.pth"
    assert steps_in_db(project) == [5] and find_resumable(folder.run_dir).path == earlier
    with open_db(project.folder) as db:
        assert checkpoints.get(db, "tiny-2", 15)


@pytest.mark.parametrize("stale", [None, "0" * 64])
def test_going_on_from_one_that_was_never_registered(
    project: Project, folder: CheckpointFolder, stale: str | None
) -> None:
    path = folder.save(5, content(5))
    with open_db(project.folder) as db:
        saved = checkpoints.get(db, "tiny-1", 5)
        checkpoints.remove(db, "tiny-1", 5)
        if stale:
            checkpoints.put(db, checkpoints.Checkpoint("tiny-1", 5, saved.path, stale, 1))
    folder.go_on_from(5, path)
    with open_db(project.folder) as db:
        row = checkpoints.get(db, "tiny-1", 5)
    assert (row.path, row.sha256, row.size_bytes) == (saved.path, saved.sha256, saved.size_bytes)


def test_what_a_killed_save_left_is_put_in_order(project: Project, folder: CheckpointFolder) -> None:
    """A manifest whose file never came, a row of a file that is gone, a file without its row, one too many."""
    first, *_, last = [folder.save(step, content(step), keep=(2, 4, 6)) for step in (2, 4, 6, 8)]
    (folder.run_dir / "step_10.manifest.json").write_text("{}")
    with open_db(project.folder) as db:
        checkpoints.remove(db, "tiny-1", 8)
        checkpoints.put(db, checkpoints.Checkpoint("tiny-1", 5, "runs/tiny-1/step_5.pth", "0" * 64, 1))
    folder.go_on_from(8, last, keep=(2,))
    assert steps_in_db(project) == [2, 6, 8] and first.is_file()
    assert names(folder) == ["last_checkpoint"] + [
        f"step_{n}.{end}" for n in (2, 6, 8) for end in ("manifest.json", "pth")
    ]


def test_a_database_that_is_busy_after_a_save_is_told_at_the_next(
    project: Project, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "put", refuse)
        assert folder.save(5, content(5)).is_file()
    assert steps_in_db(project) == []
    folder.save(6, content(6))
    assert steps_in_db(project) == [5, 6]


def refuse(*_: object) -> None:
    raise StoreBusyError("The database cannot be used: database is locked.")


def test_a_save_that_breaks_off_leaves_no_manifest(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_plan", faults.Plan.read("full@rename step_N.pth"))
    with pytest.raises(DiskFullError, match="unharmed"):
        folder.save(5, content(5))
    assert names(folder) == []


def damage(path: Path, how: str) -> None:
    manifest = path.with_suffix(".manifest.json")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:30])
    elif how == "other manifest":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "sha256": "0" * 64}))


@pytest.mark.parametrize("how", ["truncated", "bit", "no manifest", "half a manifest", "other manifest"])
def test_resume_passes_over_what_is_damaged(folder: CheckpointFolder, how: str) -> None:
    older, newer = folder.save(5, content(5)), folder.save(10, content(10))
    assert find_resumable(folder.run_dir).path == newer
    damage(newer, how)
    found = find_resumable(folder.run_dir)
    assert found.path == older and len(found.notices) == 1 and "step_10.pth" in found.notices[0]
    with pytest.raises(CheckpointError):
        load_checkpoint(newer)


def test_nothing_sound_is_an_error_and_nothing_at_all_is_not(folder: CheckpointFolder) -> None:
    assert find_resumable(folder.run_dir).path is None
    damage(folder.save(5, content(5)), "bit")
    with pytest.raises(CheckpointError, match="step_5.pth.*sha256"):
        find_resumable(folder.run_dir)


def test_a_foreign_file_with_a_manifest_is_not_resumed(folder: CheckpointFolder) -> None:
    path = folder.save(5, {"model": torch.ones(3)})
    with pytest.raises(CheckpointError, match="retune/1"):
        load_checkpoint(path)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writes beyond this size fail in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_one(project: Project, folder: CheckpointFolder) -> None:
    good = folder.save(5, content(5))
    before = names(folder)
    with largest_file(100_000), pytest.raises(DiskFullError, match="step_6.pth.*unharmed"):
        folder.save(6, content(6))
    assert names(folder) == before and steps_in_db(project) == [5]
    assert find_resumable(folder.run_dir).path == good


def test_saving_over_a_step_on_a_full_disk_keeps_the_old_file(folder: CheckpointFolder) -> None:
    good = folder.save(5, content(5))
    with largest_file(100_000), pytest.raises(DiskFullError):
        folder.save(5, content(5, num_weights=60_000))
    assert torch.equal(load_checkpoint(good)["state_dict"]["w"], torch.full((50_000,), 5))


def test_too_little_space_is_found_before_writing(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.save(5, content(5))
    size = path.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size - 1))
    with pytest.raises(DiskFullError, match="step_6.pth"):
        folder.save(6, content(6))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    assert folder.save(6, content(6)).is_file()


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    torch.save(checkpoint.rng_state(), tmp_path / "rng.pth")
    expected = [draw() for _ in range(3)]
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_tied_weights_count_once() -> None:
    weight = torch.zeros(1000)
    assert checkpoint.num_tensor_bytes({"a": weight, "b": [weight.view(10, 100), torch.zeros(10)]}) == 4040
