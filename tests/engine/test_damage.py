"""Five hundred random damages: each file gives identical data or a typed error, never other data, and nothing runs."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.checkpoint_files import manifest_path, verify
from studio.engine.checkpoint import CheckpointFolder, load_checkpoint
from studio.engine.merge import read_adapter
from studio.engine.safe_load import load_pth
from studio.engine.weights import save_tensors, seal
from studio.errors import StudioError
from studio.projects import Project
from studio.weight_folders import ADAPTER_WEIGHTS
from tests.damage import KINDS, Bomb, damage_file, watched
from tests.engine.kills import differences

CONTENT = {
    "meta": {"format": "retune/1", "step": 5, "run_id": "tiny-1"},
    "state_dict": {f"layer.{n}": torch.arange(2000, dtype=torch.float32) * n for n in range(4)},
    "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(3000)}}, "groups": [{"lr": 0.1}]},
    "rng": {"python": (3, tuple(range(625)), None), "torch": torch.get_rng_state()},
}  # fmt: skip
Read = Callable[[Path], Any]


@pytest.fixture
def checkpoint(project: Project) -> Path:
    run_dir = project.path("runs", "tiny-1")
    run_dir.mkdir(parents=True)
    return CheckpointFolder(project.folder, "tiny-1", run_dir, keep_last=2).save(5, CONTENT)


@pytest.fixture
def folder_checkpoint(project: Project) -> Path:
    """A checkpoint that is a folder of files."""

    def write(path: Path) -> None:
        path.mkdir()
        for number in range(3):
            torch.save({"part": torch.arange(3000) + number}, path / f"part_{number}.pt")

    run_dir = project.path("runs", "tiny-2")
    run_dir.mkdir(parents=True)
    return CheckpointFolder(project.folder, "tiny-2", run_dir, keep_last=2).commit(7, write)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    save_tensors({f"a.{n}.weight": torch.randn(40, 50) for n in range(4)}, folder / ADAPTER_WEIGHTS)
    seal(folder, "# Luna", {"base": "starter"})
    return folder


def read_folder(path: Path) -> dict[str, bytes]:
    """What a reader of a folder does first, and what is in it then."""
    if found := verify(path):
        raise StudioError(found)
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


def judge(read: Read, source: Path, victim: Path, number: int, seed: int) -> dict[str, int]:
    """Damage `victim` again and again and read `source`; how often each kind of damage gave data or an error."""
    sound, expected, chance = victim.read_bytes(), read(source), random.Random(seed)
    counts: dict[str, int] = {}
    for trial in range(number):
        how = damage_file(victim, chance)
        with watched() as seen:
            try:
                wrong, end = differences(expected, read(source)), "identical"
            except StudioError as error:
                assert str(error).strip() and error.message, (trial, how)
                wrong, end = [], "refused"
        assert not wrong and not seen, (trial, how, wrong[:3], seen)
        counts[f"{how} {end}"] = counts.get(f"{how} {end}", 0) + 1
        victim.write_bytes(sound)
    return counts


def test_checkpoints(checkpoint: Path) -> None:
    counts = judge(load_checkpoint, checkpoint, checkpoint, 140, seed=1)
    assert set(counts) - {"page_of_zeros identical"} == {f"{kind.__name__} refused" for kind in KINDS}, counts


def test_files_of_others_without_a_manifest(checkpoint: Path) -> None:
    counts = judge(load_pth, checkpoint, checkpoint, 140, seed=2)
    assert counts["bit_flipped refused"] > 10 and counts["hostile_pickle refused"] > 10, counts


def test_manifests(checkpoint: Path) -> None:
    counts = judge(load_checkpoint, checkpoint, manifest_path(checkpoint), 100, seed=3)
    assert counts["cut_short refused"] > 5, counts


def test_folders(folder_checkpoint: Path) -> None:
    judge(read_folder, folder_checkpoint, folder_checkpoint / "part_1.pt", 60, seed=4)
    judge(read_folder, folder_checkpoint, manifest_path(folder_checkpoint), 30, seed=5)
    (folder_checkpoint / "part_9.pt").write_bytes(b"more")
    assert "part_9.pt is not in its manifest" in verify(folder_checkpoint)
    (folder_checkpoint / "part_9.pt").unlink()
    (folder_checkpoint / "part_0.pt").unlink()
    assert "part_0.pt is missing" in verify(folder_checkpoint)


def test_adapters(adapter: Path) -> None:
    def read(folder: Path) -> dict[str, torch.Tensor]:
        return dict(read_adapter(folder).tensors)

    counts = judge(read, adapter, adapter / ADAPTER_WEIGHTS, 100, seed=6)
    assert all(name.endswith("refused") for name in counts), counts


def test_the_watch_sees_what_runs() -> None:
    """The control: a careless reader runs the bomb, and the watch of the other tests notices it."""
    import pickle

    with watched() as seen:
        pickle.loads(pickle.dumps(Bomb()))  # unsafe on purpose, and of our own making
        os.stat("/")
    assert seen == ["os.system"]
