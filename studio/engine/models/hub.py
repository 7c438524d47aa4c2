"""Downloads from the Hugging Face hub and from ModelScope: weights, tokenizer and config only, never code."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from studio.data.old_tokenizers import can_be_made
from studio.engine.models.download import Progress
from studio.errors import ModelError
from studio.models import sha256_mismatches
from studio.paths import remove, require_free_space

TEXT_SUFFIXES = {".json", ".model", ".txt", ".jinja"}
WHAT = "Downloading {}"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model on a hub; `sha256` is None where the hub does not state it (small text files)."""

    name: str
    size_bytes: int
    sha256: str | None


def download_huggingface(model_id: str, folder: Path, progress: Progress) -> str:
    """Bring a Hugging Face model into `folder`, going on where an earlier try stopped; says where it came from.

    Raises ModelError when the model cannot be had or has no usable weights, DiskFullError before downloading.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _explained(model_id, "the Hugging Face hub"):
        info = HfApi().model_info(model_id, files_metadata=True)
        listed = [RemoteFile(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else None) for f in info.siblings or []]
        files = choose_files(model_id, listed)

        def get(file: RemoteFile, report: Callable[[int], None]) -> None:
            hf_hub_download(model_id, file.name, revision=info.sha, local_dir=folder, tqdm_class=_reporting_bar(report))

        _get_all(model_id, files, folder, get, progress)
    remove(folder / ".cache")
    return f"huggingface:{model_id}@{info.sha}"


def download_modelscope(model_id: str, folder: Path, progress: Progress) -> str:
    """As `download_huggingface`, from ModelScope. Raises ModelError when its optional package is not installed."""
    if importlib.util.find_spec("modelscope_hub") is None:
        raise ModelError(
            "Fetching from ModelScope needs the package `modelscope`, which is not installed.",
            'Install it with `pip install "retune[modelscope]"` and try again.',
        )
    from modelscope_hub import HubApi
    from modelscope_hub.compat.snapshot_download import snapshot_download

    with _explained(model_id, "ModelScope"):
        listed = [RemoteFile(f.path, f.size, f.sha256) for f in HubApi().list_repo_files(model_id, "model")]
        files = choose_files(model_id, listed)

        def get(file: RemoteFile, report: Callable[[int], None]) -> None:
            callbacks = [_reporting_callback(report)]
            snapshot_download(model_id, local_dir=str(folder), allow_patterns=[file.name], progress_callbacks=callbacks)

        _get_all(model_id, files, folder, get, progress)
    return f"modelscope:{model_id}"


def choose_files(model_id: str, listed: list[RemoteFile]) -> list[RemoteFile]:
    """The files to fetch: top-level text files, and one set of weights, safetensors before pickled ones."""
    top = [file for file in listed if "/" not in file.name and not file.name.startswith(".")]
    weights = _weights(top, "model", ".safetensors") or _weights(top, "pytorch_model", ".bin")
    if not weights:
        found = ", ".join(sorted({Path(file.name).suffix for file in listed} - {""})) or "no files"
        raise ModelError(
            f"{model_id} has no weights that can be trained (found: {found}).",
            "Choose a model in Hugging Face format: model.safetensors, or pytorch_model.bin.",
        )
    kept_index = f"{weights[0].name.split('-')[0].split('.')[0]}{Path(weights[0].name).suffix}.index.json"
    texts = [file for file in top if Path(file.name).suffix in TEXT_SUFFIXES]
    return [f for f in texts if not f.name.endswith(".index.json") or f.name == kept_index] + weights


def _weights(files: list[RemoteFile], stem: str, suffix: str) -> list[RemoteFile]:
    whole = [file for file in files if file.name == stem + suffix]
    return whole or [file for file in files if file.name.startswith(f"{stem}-") and file.name.endswith(suffix)]


def _get_all(
    model_id: str,
    files: list[RemoteFile],
    folder: Path,
    get: Callable[[RemoteFile, Callable[[int], None]], None],
    progress: Progress,
) -> None:
    """One file after the other, so that a stop request raised by `progress` ends the download."""
    total = sum(file.size_bytes for file in files)
    have = sum((folder / file.name).stat().st_size for file in files if (folder / file.name).is_file())
    require_free_space(folder, max(0, total - have), model_id)
    folder.mkdir(parents=True, exist_ok=True)
    before = 0
    for file in files:
        counter = _Counter(before, total, WHAT.format(model_id), progress)
        counter.add(0)
        get(file, counter.add)
        before += file.size_bytes
    progress(total, total, "Checking the files")
    _check(files, folder)
    _ensure_fast_tokenizer(model_id, folder)


class _Counter:
    """Adds up the bytes of one file and reports them on top of the files before it."""

    def __init__(self, before: int, total: int, what: str, progress: Progress) -> None:
        self.done, self.total, self.what, self.progress = before, total, what, progress

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(min(self.done, self.total), self.total, self.what)


def _check(files: list[RemoteFile], folder: Path) -> None:
    wrong = sha256_mismatches(folder, {file.name: file.sha256 for file in files if file.sha256})
    for name in wrong:
        (folder / name).unlink()
    if wrong:
        raise ModelError(
            f"The download of {', '.join(wrong)} differs from what the hub states (sha256); it was deleted.",
            "Try again; the other files are kept.",
        )


def _ensure_fast_tokenizer(model_id: str, folder: Path) -> None:
    """Older models bring only tokenizer.model; the preview and the trainer both read tokenizer.json."""
    if (folder / "tokenizer.json").is_file() or can_be_made(folder):
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise _no_fast_tokenizer(model_id) from error
    if not (folder / "tokenizer.json").is_file():
        raise _no_fast_tokenizer(model_id)


def _no_fast_tokenizer(model_id: str) -> ModelError:
    return ModelError(
        f"{model_id} has no tokenizer.json, and none can be made from its other files without running its code.",
        "Choose a version of the model that brings tokenizer.json.",
    )


@contextlib.contextmanager
def _explained(model_id: str, where: str) -> Iterator[None]:
    """Turn a hub's errors into one sentence that names the model and the next move."""
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"{model_id} is not here, and HF_HUB_OFFLINE forbids fetching it.", "Unset HF_HUB_OFFLINE."
        ) from error
    except GatedRepoError as error:
        hint = "Accept its licence on its page, then set HF_TOKEN in the environment and try again."
        raise ModelError(f"{model_id} is only for those who accepted its licence.", hint) from error
    except RepositoryNotFoundError as error:
        hint = "Check the spelling; for a private model set HF_TOKEN in the environment."
        raise ModelError(f"There is no public model {model_id} on {where}.", hint) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        hint = "Check the network and try again; what has arrived is kept. HF_ENDPOINT chooses a mirror."
        raise ModelError(f"{model_id} could not be fetched from {where}: {reason}.", hint) from error


def _reporting_bar(report: Callable[[int], None]) -> type:
    """A tqdm class that draws nothing and passes on the bytes of each update."""
    from tqdm import tqdm

    class ReportingBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            initial = int(kwargs.get("initial") or 0)  # type: ignore[call-overload]
            super().__init__(*args, **{**kwargs, "disable": True})
            report(initial)

        def update(self, n: float | None = 1) -> None:
            report(int(n or 0))

    return ReportingBar


def _reporting_callback(report: Callable[[int], None]) -> type:
    """A ModelScope progress callback that passes on the bytes of each update."""
    from modelscope_hub import ProgressCallback

    class ReportingCallback(ProgressCallback):
        def update(self, size: int) -> None:
            report(size)

    return ReportingCallback
