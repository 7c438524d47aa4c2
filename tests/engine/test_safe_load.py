"""Hostile and damaged `.pth` files: refused with a reason, and nothing in them runs."""

import argparse
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from studio.engine.safe_load import load_pth
from studio.errors import CheckpointError, UnsafeFileError

CONTENT = {"weights": {"a": torch.arange(20_000, dtype=torch.float32)}, "meta": {"step": 3, "names": ["x", None, 1.5]}}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "step_3.pth"
    torch.save(CONTENT, path)
    return path


class Bomb:
    """Runs a shell command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def test_plain_containers_and_tensors_come_back(sound: Path) -> None:
    content = load_pth(sound)
    assert torch.equal(content["weights"]["a"], CONTENT["weights"]["a"]) and content["meta"] == CONTENT["meta"]


def bomb_in_zip(path: Path, bomb: Bomb) -> None:
    torch.save({"weights": bomb}, path)


def bomb_in_legacy_file(path: Path, bomb: Bomb) -> None:
    torch.save({"weights": bomb}, path, _use_new_zipfile_serialization=False)


def bare_bomb(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb))


def bomb_beside_a_sound_pickle(path: Path, bomb: Bomb) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(bomb))


def bomb_of_builtins(path: Path, bomb: Bomb) -> None:
    class Exec:
        def __reduce__(self) -> tuple:
            return exec, (f"open({str(bomb.canary)!r}, 'w')",)

    torch.save({"weights": Exec()}, path)


BOMBS = [bomb_in_zip, bomb_in_legacy_file, bare_bomb, bomb_beside_a_sound_pickle, bomb_of_builtins]


@pytest.mark.parametrize("plant", BOMBS, ids=lambda plant: plant.__name__)
def test_a_bomb_is_refused_and_does_not_go_off(
    sound: Path, tmp_path: Path, plant: Callable[[Path, Bomb], None]
) -> None:
    canary = tmp_path / "canary"
    plant(sound, Bomb(canary))
    with pytest.raises(UnsafeFileError) as refused:
        load_pth(sound)
    assert not canary.exists()
    assert "not opened" in str(refused.value) and refused.value.hint
    assert "weights_only=False" not in str(refused.value)  # torch's own message advises it; ours must not


def test_the_bombs_of_these_tests_do_go_off_when_loaded_carelessly(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bare_bomb(tmp_path / "bomb.pth", Bomb(canary))
    pickle.loads((tmp_path / "bomb.pth").read_bytes())  # unsafe on purpose: the control of the refusals above
    assert canary.exists()


@pytest.mark.parametrize("value", [argparse.Namespace(lr=1), numpy.arange(3)], ids=["namespace", "numpy"])
def test_foreign_classes_are_named(tmp_path: Path, value: object) -> None:
    torch.save({"args": value}, tmp_path / "foreign.pth")
    with pytest.raises(UnsafeFileError, match="it calls for (argparse|numpy)"):
        load_pth(tmp_path / "foreign.pth")


@pytest.mark.parametrize("kept", [0, 1, 100, 40_000, -1])
def test_a_file_that_was_cut_short(sound: Path, kept: int) -> None:
    sound.write_bytes(sound.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as damaged:
        load_pth(sound)
    assert damaged.value.hint and "step_3.pth" in str(damaged.value)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_one_flipped_bit_is_noticed(sound: Path, place: float) -> None:
    """torch.load itself returns other numbers without a word."""
    content = bytearray(sound.read_bytes())
    content[int(len(content) * place)] ^= 1
    sound.write_bytes(content)
    assert isinstance(torch.load(sound, weights_only=True), dict)
    with pytest.raises(CheckpointError, match="checksum"):
        load_pth(sound)


def test_a_page_of_zeros_is_noticed(sound: Path) -> None:
    content = sound.read_bytes()
    sound.write_bytes(content[:30_000] + bytes(4096) + content[34_096:])
    with pytest.raises(CheckpointError, match="checksum"):
        load_pth(sound)


def test_what_is_no_checkpoint_says_so(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "zeros.pth").write_bytes(bytes(100_000))
    torch.save([1, 2], tmp_path / "list.pth")
    shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path, "text.pth")
    for name in ("text.pth", "zeros.pth", "list.pth", "other.zip", "nothing.pth", "."):
        with pytest.raises(CheckpointError):
            load_pth(tmp_path / name)
