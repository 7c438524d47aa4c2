"""A build of C++ parts that was killed does not hold up the ones after it."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from studio.engine import extensions
from studio.engine.extensions import Baton


def hold(lock: str, says: Connection) -> None:
    baton = Baton(lock)
    says.send(baton.try_acquire())
    says.recv()


def test_the_lock_of_a_killed_build_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()  # what torch's own way leaves behind
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    builder = processes.Process(target=hold, args=(str(lock), theirs))
    builder.start()
    assert ours.poll(60) and ours.recv() is True
    assert not Baton(str(lock)).try_acquire()
    builder.kill()
    builder.join()
    Baton(str(lock)).wait()
    mine = Baton(str(lock))
    assert mine.try_acquire()
    mine.release()


def test_builds_have_a_folder_of_their_own_unless_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    extensions.prepare()
    found = Path(cpp_extension._get_build_directory("part", verbose=False))
    assert found.parent.parent == tmp_path / "retune" / "extensions" and "torch-" in found.parent.name
    assert cpp_extension.FileBaton is Baton
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    extensions.prepare()
    assert Path(cpp_extension._get_build_directory("part", verbose=False)).parent == tmp_path / "chosen"
