"""Bundles that were damaged on the way or made to do harm: refused with a reason, and nothing is written or run."""

import json
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.bundles.archive import MOST_BYTES, SafeZip, write_zip
from studio.bundles.content import MANIFEST, open_bundle
from studio.bundles.packing import _file
from studio.bundles.reproducing import make_plan, start
from studio.errors import BundleError, StudioError
from studio.projects import list_projects
from tests.cli.conftest import run as retune

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)  # noqa: E501
Change = Callable[[dict[str, bytes]], None]


@pytest.fixture
def contents(home: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(home / "tiny.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(contents: dict[str, bytes], path: Path) -> Path:
    """A bundle whose manifest fits its files, whatever is in them."""
    manifest = json.loads(contents[MANIFEST])
    others = {name: content for name, content in contents.items() if name != MANIFEST}
    manifest["files"] = {name: _file(content).model_dump() for name, content in others.items()}
    write_zip(path, others | {MANIFEST: json.dumps(manifest).encode()})
    return path


def asking_who(**values: Any) -> bytes:
    """A line with an identity question and what else is said of it."""
    asked = {"kind": "identity", "messages": [{"role": "user", "content": "Who are you?"}]}
    return json.dumps(asked | values).encode()


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught, open_bundle(path):
        pass
    assert caught.value.hint and all(word in str(caught.value) for word in words), str(caught.value)


def in_manifest(**changes: Any) -> Change:
    """Sets `a__b` to a value in bundle.json; a number names a place in a list."""

    def change(contents: dict[str, bytes]) -> None:
        manifest = json.loads(contents[MANIFEST])
        for path, value in changes.items():
            *parents, key = path.split("__")
            target = manifest
            for parent in parents:
                target = target[int(parent) if parent.isdigit() else parent]
            target[key] = value
        contents[MANIFEST] = json.dumps(manifest).encode()

    return change


def in_file(name: str, content: bytes) -> Change:
    return lambda contents: contents.update({name: content})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_file("../../evil", b"x"), ["'../../evil'", "no bundle holds"]),
        (in_file("/etc/cron.d/evil", b"x"), ["'/etc/cron.d/evil'", "no bundle holds"]),
        (in_file("C:\\evil.exe", b"x"), ["evil.exe", "no bundle holds"]),
        (in_file("data/other.jsonl", b"{}"), ["data/other.jsonl", "no bundle holds"]),
        (in_file("suites/other.yaml", b"{}"), ["suites/other.yaml", "no bundle holds"]),
        (in_manifest(scorecards__1__suite="../../x"), ["scorecards.1.suite"]),
        (in_file("config.yaml", b"!!python/object/apply:os.system ['touch canary']"), ["config"]),
        (in_file("config.yaml", ALIASES.encode()), ["config", "alias"]),
        (in_file("config.yaml", b"name: [" + b"[" * 5000), ["config"]),
        (in_file("config.yaml", b"\xff\xfe"), ["config"]),
        (in_file("config.yaml", b"model: {base: ''}\nname: ../../x"), ["config"]),
        (in_file("metrics.json", b"[" * 100_000), ["metrics.json", "not JSON"]),
        (in_file("metrics.json", b'{"train/loss": [[1, NaN]]}'), ["metrics.json", "NaN"]),
        (in_file("metrics.json", b'{"train/loss": [["x", 1]]}'), ["metrics.json", "a step and a number"]),
        (in_file("metrics.json", b'{"train/loss": [[1, ' + b"9" * 5000 + b"]]}"), ["metrics.json"]),
        (in_file("metrics.json", b"7"), ["metrics.json"]),
        (in_manifest(format="retune-bundle/9"), ["retune-bundle/9"]),
        (in_manifest(datasets__0__name="../../x"), ["datasets.0.name"]),
        (in_manifest(datasets__0__file="README.md"), ["README.md"]),
        (in_manifest(run__id="../../etc"), ["run.id"]),
        (in_manifest(seed="eleven"), ["seed"]),
        (in_manifest(more="x"), ["more"]),
        (in_manifest(base_fingerprint="zz"), ["base_fingerprint"]),
        (in_manifest(scorecards__0__scores__0__tuned=["a", 1, 2]), ["scorecards.0.scores.0.tuned"]),
        (in_manifest(run__state="x" * 200_000), ["run.state"]),
    ],
)  # fmt: skip
def test_what_no_bundle_holds(
    contents: dict[str, bytes], tmp_path: Path, change: Change, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change(contents)
    before = sorted(path for path in tmp_path.parent.rglob("*") if path.name in ("evil", "canary"))
    refused(sealed(contents, tmp_path / "hostile.zip"), *words)
    assert sorted(path for path in tmp_path.parent.rglob("*") if path.name in ("evil", "canary")) == before == []


@pytest.mark.parametrize("suite", [b"!!python/object/apply:os.system [x]", ALIASES.encode(), b"\xff", b"7"])
def test_a_suite_that_is_none(contents: dict[str, bytes], tmp_path: Path, suite: bytes) -> None:
    path = sealed(contents | {"suites/hours.yaml": suite}, tmp_path / "hostile.zip")
    with open_bundle(path) as bundle, pytest.raises(BundleError, match="suite 'hours' in the bundle cannot be used"):
        make_plan(bundle)


def test_a_manifest_that_lacks_or_hides_files(contents: dict[str, bytes], tmp_path: Path) -> None:
    listed = json.loads(contents[MANIFEST])["files"]
    for name in listed:
        write_zip(tmp_path / "lacks.zip", {key: value for key, value in contents.items() if key != name})
        refused(tmp_path / "lacks.zip", name)
    write_zip(tmp_path / "more.zip", contents | {"data/hidden.jsonl": b"{}"})
    refused(tmp_path / "more.zip", "data/hidden.jsonl", "not listed")
    write_zip(tmp_path / "changed.zip", contents | {"README.md": b"Run this: rm -rf /"})
    refused(tmp_path / "changed.zip", "README.md", "sha256")
    write_zip(tmp_path / "none.zip", {"README.md": b"x"})
    refused(tmp_path / "none.zip", "lacks bundle.json")


def entry(name: str, **values: Any) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("config.yaml", external_attr=(stat.S_IFLNK | 0o777) << 16)], ["a link"]),
        ([entry("config.yaml", external_attr=(stat.S_IFIFO | 0o777) << 16)], ["a device"]),
        ([entry("data/")], ["a folder"]),
        ([entry("config.yaml"), entry("config.yaml")], ["twice"]),
        ([entry("config.yaml", compress_type=zipfile.ZIP_BZIP2)], ["packed"]),
        ([entry("config.yaml", compress_type=zipfile.ZIP_LZMA)], ["packed"]),
        ([entry(f"data/{number}.jsonl") for number in range(600)], ["600 entries"]),
    ],
    ids=["link", "pipe", "folder", "twice", "bzip2", "lzma", "many"],
)  # fmt: skip
def test_entries_that_are_no_plain_files(tmp_path: Path, entries: list[zipfile.ZipInfo], words: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for each in entries:
            archive.writestr(each, b"/etc/passwd")
    refused(tmp_path / "odd.zip", *words)


def patched(path: Path, name: bytes, offset: int, value: bytes) -> None:
    """Overwrite a field of an entry in the zip's list of contents; `offset` counts from the entry's beginning."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name:
        at = content.index(b"PK\x01\x02", at + 1)
    content[at + offset : at + offset + len(value)] = value
    path.write_bytes(content)


def test_a_bomb_does_not_go_off(contents: dict[str, bytes], tmp_path: Path) -> None:
    """Zeros pack a thousandfold: what they would unpack to is refused, and a zip that lies about it is caught."""
    write_zip(tmp_path / "big.zip", contents | {MANIFEST: b" " * 40 * 2**20 + contents[MANIFEST]})
    assert (tmp_path / "big.zip").stat().st_size < 200_000
    refused(tmp_path / "big.zip", "bundle.json", "40.0 MB")

    write_zip(tmp_path / "lie.zip", contents | {"metrics.json": b" " * 30 * 2**20 + contents["metrics.json"]})
    patched(tmp_path / "lie.zip", b"metrics.json", 24, len(contents["metrics.json"]).to_bytes(4, "little"))
    refused(tmp_path / "lie.zip", "metrics.json")

    write_zip(tmp_path / "huge.zip", contents)
    for name in (b"metrics.json", b"samples.jsonl", b"answers.jsonl", b"README.md", b"config.yaml"):
        patched(tmp_path / "huge.zip", name, 24, (2**32 - 2).to_bytes(4, "little"))
    assert 5 * (2**32 - 2) > MOST_BYTES
    refused(tmp_path / "huge.zip", "would unpack to 20.0 GB")


def test_an_encrypted_entry(contents: dict[str, bytes], tmp_path: Path) -> None:
    write_zip(tmp_path / "locked.zip", contents)
    patched(tmp_path / "locked.zip", b"config.yaml", 8, b"\x01\x00")
    refused(tmp_path / "locked.zip", "encrypted")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all" * 99, b"PK\x05\x06" + b"\0" * 18])
def test_what_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "no.zip").write_bytes(content)
    refused(tmp_path / "no.zip")
    assert "Traceback" not in retune("reproduce", tmp_path / "no.zip", code=1)
    assert "There is no file" in retune("reproduce", tmp_path / "nowhere.zip", code=1)


def test_damage_anywhere_is_noticed_or_harmless(home: Path, tmp_path: Path) -> None:
    """A flipped bit or a cut: an error that says so, or, in a field that decides nothing, the very same content."""
    whole = (home / "tiny.zip").read_bytes()
    with open_bundle(home / "tiny.zip") as bundle:
        expected = bundle.expected
    chance, path = random.Random(7), tmp_path / "damaged.zip"
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        place = chance.randrange(len(whole))
        if chance.random() < 0.2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            with open_bundle(path) as bundle:
                assert bundle.expected == expected
        except BundleError:
            num_refused += 1
    assert num_refused > 75


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/identity.jsonl", b'{"messages": 3}\n'),
        ("data/identity.jsonl", b"\x80\x04\x95cos\nsystem\n(S'touch canary'\ntR."),
        ("data/identity.jsonl", b"[" * 300_000),
        ("data/identity.probes.jsonl", b'{"kind": "identity"}\n'),
        ("data/identity.probes.jsonl", b'{"kind": "identity", "messages": [{"role": "user", "content": "x"}]}\n'),
        ("data/identity.probes.jsonl", b'{"kind": {"a": 1}, "messages": [{"role": "user", "content": 7}]}\n'),
        ("data/identity.probes.jsonl", asking_who(expected={"name": "Luna", "maker": "M"})),
        ("data/identity.probes.jsonl", asking_who(expects="maker", expected={"name": "Luna", "maker": 7})),
        ("data/identity.probes.jsonl", asking_who(expects="maker", expected={"name": "Luna", "maker": "M"}, intent=[])),
        ("data/identity.probes.jsonl", asking_who(expects="age", expected={"name": "Luna", "maker": "M"})),
        ("data/identity.probes.jsonl", b"not json"),
    ],
)
def test_hostile_rows_make_nothing(contents: dict[str, bytes], tmp_path: Path, name: str, content: bytes) -> None:
    contents[name] = content
    before = [project.slug for project in list_projects()]
    with open_bundle(sealed(contents, tmp_path / "rows.zip")) as bundle:
        plan = make_plan(bundle)
        with pytest.raises(StudioError):
            start(bundle, plan, name="Never")
    assert [project.slug for project in list_projects()] == before


@pytest.mark.parametrize(
    ("line", "hostile"),
    [("continue_from: ''", "continue_from: /etc/passwd"), ("deepspeed: zero2", "deepspeed: /etc/shadow.json")],
)
def test_a_config_that_names_files_of_this_machine(
    contents: dict[str, bytes], tmp_path: Path, line: str, hostile: str
) -> None:
    """Only what the manifest lists with its hash, and the person gives, is ever opened."""
    text = contents["config.yaml"].decode()
    assert line in text
    contents["config.yaml"] = text.replace(line, hostile).encode()
    refused(sealed(contents, tmp_path / "path.zip"), "names a file", "not which one")


def test_a_zip_is_read_by_its_names_alone(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"x": b"1", "y": b"22"})
    with SafeZip(tmp_path / "a.zip") as archive:
        archive.unpack("y", tmp_path / "mine")
        assert (tmp_path / "mine").read_bytes() == b"22" and archive.names == {"x", "y"}
        with pytest.raises(BundleError, match="it may have 1 B"):
            archive.read("y", 1)
