"""Names become safe, paths stay inside, and a file is the old one or the new one, never half of each."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from studio import paths
from studio.errors import DiskFullError, ProjectError
from studio.paths import REPOSITORY, atomic_path, atomic_write_bytes, atomic_write_json, inside, slugify

HOSTILE = [
    "../../etc",
    "..",
    ".",
    "/",
    "\\",
    "con",
    "NUL",
    "a/b",
    "~root",
    "-rf",
    ".studio",
    "项目 一",
    "🌙",
    "a" * 999,
]


@given(name=st.text(max_size=80))
@example("../../etc")
@example(".studio")
@example("COM1")
@example("🌙🌙")
@example("a" * 500)
def test_any_name_becomes_one_safe_folder_name(name: str) -> None:
    slug = slugify(name)
    assert slug and slug == slug.lower() and slug.isascii() and len(slug) <= 80
    assert all(c.isalnum() or c in "-_" for c in slug) and slug[0].isalnum()
    assert slug not in paths.RESERVED_SLUGS
    assert slugify(slug) == slug


@given(names=st.lists(st.sampled_from([*HOSTILE, "Luna", "luna", "LUNA!"]), max_size=12))
def test_slugs_are_never_given_twice(names: list[str]) -> None:
    taken: set[str] = set()
    for name in names:
        slug = slugify(name, taken)
        assert slug not in taken
        taken.add(slug)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "..", "link/x", "\0", "a\0b"])
def test_a_path_that_leaves_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ProjectError):
        inside(root, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(["..", ".", "a", "b", "link", "/", ""]), max_size=8))
def test_what_is_let_through_lies_below(tmp_path: Path, parts: list[str]) -> None:
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/etc")
    try:
        found = inside(root, "/".join(parts))
    except ProjectError:
        return
    assert found == root.resolve() or root.resolve() in found.parents


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "luna").mkdir()
    (tmp_path / "luna-2").mkdir()
    with pytest.raises(ProjectError):
        inside(tmp_path / "luna", "../luna-2/studio.db")
    assert inside(tmp_path / "luna", "runs/../data") == tmp_path / "luna" / "data"


def test_a_write_that_fails_leaves_the_old(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    atomic_write_json(target, {"new": "值"})
    assert "值" in target.read_text() and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["two"] and os.listdir(tmp_path) == ["folder"]
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    assert (target / "two").read_text() == "two"


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    atomic_write_bytes(tmp_path / "link", b"mine")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "link").is_symlink()
    (tmp_path / "dir").mkdir()
    (tmp_path / "to-dir").symlink_to(tmp_path / "dir")
    paths.remove(tmp_path / "to-dir")
    assert (tmp_path / "dir").is_dir() and not (tmp_path / "to-dir").exists()
    paths.remove(tmp_path / "never was")


KILLED = """
import sys, time
from pathlib import Path
from studio.paths import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_kill_while_writing_leaves_the_old(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    paths.clear_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # too young: it may belong to a process that is not seen from here
    paths.clear_leftovers(tmp_path, older_than_seconds=0)
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_had_moved_aside_goes_back(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine, gone = f".tmp-{os.getpid()}-0-a", f".old-{ended.pid}-0123abcd-run-1"
    for name in (mine, gone, ".tmp-strange", ".other-1-2-3"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    atomic_write_bytes(tmp_path / "file", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([mine, "run-1", ".tmp-strange", ".other-1-2-3", "file"])


@pytest.fixture
def small_files() -> object:
    """Files may not grow beyond 64 KB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_leaves_the_old(tmp_path: Path, small_files: object) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(DiskFullError, match="unharmed"):
        atomic_write_bytes(target, b"x" * 200_000)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="needs 1024.0 TB"):
        paths.require_free_space(tmp_path / "not" / "there" / "yet", 2**50, "a checkpoint")
    paths.require_free_space(tmp_path, 1, "a byte")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.ENOENT, "x"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_full_disk_in_any_clothing(tmp_path: Path, error: Exception, full: bool) -> None:
    assert paths.is_disk_full(error, tmp_path) is full


def test_sizes_in_words() -> None:
    sizes = [0, 1023, 1536, 5 * 2**20, 3 * 2**40]
    assert [paths.human_bytes(size) for size in sizes] == ["0 B", "1023 B", "1.5 KB", "5.0 MB", "3.0 TB"]


def test_a_hash_reads_the_whole_file_and_says_how_far(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a" * (5 * 2**20))
    seen: list[int] = []
    digest = paths.sha256_of(tmp_path / "f", seen.append)
    assert seen == [4 * 2**20, 5 * 2**20]
    (tmp_path / "f").write_bytes(b"a" * (5 * 2**20 - 1) + b"b")
    assert paths.sha256_of(tmp_path / "f") != digest


def test_links_do_not_count_as_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"12345")
    (tmp_path / "a" / "big").symlink_to(sys.executable)
    assert paths.folder_bytes(tmp_path / "a") == 5
