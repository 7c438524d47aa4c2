"""Folders of weights that leave the studio: what goes into them, how they are written and recognised."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from studio.data.named import NamedTemplate, as_jinja
from studio.data.old_tokenizers import can_be_made
from studio.data.talk import WEIGHTS_FILE
from studio.data.template import CHAT_TEMPLATE_FILE
from studio.data.tokens import TextTokenizer
from studio.errors import CheckpointError
from studio.machine import versions
from studio.models import BaseModel, model_fingerprint, require, resolve
from studio.paths import atomic_path, atomic_write_json, atomic_write_text, require_free_space, sha256_of
from studio.weight_folders import json_object, require_replaceable

CARD_FILE = "README.md"
# What a tokenizer consists of, in any family; weights and code are not among them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE_FILE,
)
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# Settings of a tokenizer_config.json that ask for Python code of the model, or name what such code is told.
OF_OWN_CODE = ("auto_map", "tokenizer_class", "sp_model_kwargs", "decode_with_prefix_space")
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Base:
    """The base model that weights belong to. `reference` is what other tools find it by: a hub id or a folder."""

    name: str
    folder: Path
    fingerprint: str
    reference: str

    @property
    def is_here(self) -> bool:
        """False for the base of an adapter that came from elsewhere without it."""
        return bool(self.fingerprint)


def known_base(name: str, expected_fingerprint: str = "", what: str = "These weights") -> Base:
    """The base model of that name. Raises ModelError when it is not here, CheckpointError when it is another one."""
    folder = require(name)
    fingerprint = model_fingerprint(folder)
    if expected_fingerprint and fingerprint != expected_fingerprint:
        raise CheckpointError(
            f"{what} belong to another base model than {name!r}: they were trained on one with fingerprint "
            f"{expected_fingerprint[:12]}, and {name!r} has {fingerprint[:12]}.",
            "Give the base that they were trained on; its files must not have changed since.",
        )
    return Base(name, folder, fingerprint, _reference(resolve(name)))


def _reference(model: BaseModel) -> str:
    # Other tools look an id up on Hugging Face alone, and the starter's weights are not byte for byte those of a hub.
    return model.id if model.kind == "huggingface" else str(model.folder)


@contextmanager
def output_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` at the end; a failure leaves what was there.

    Raises StudioError when `out` holds something that we did not make, DiskFullError when there is no room.
    """
    require_replaceable(out)
    require_free_space(out, num_bytes + SPARE_BYTES, f"the model {out.name}")
    with atomic_path(out) as temporary:
        temporary.mkdir()
        yield temporary


def copy_tokenizer(base: Path, out: Path) -> None:
    """Tokenizer files, chat template and generation config of the base, byte for byte.

    Of a base that brings no tokenizer.json, the one that is made for it goes along, and no class of its own is named.
    """
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if not (base / TOKENIZER_JSON).is_file() and can_be_made(base):
        TextTokenizer.load(base).save(out / TOKENIZER_JSON)
        config = {name: value for name, value in json_object(out / TOKENIZER_CONFIG).items() if name not in OF_OWN_CODE}
        atomic_write_json(out / TOKENIZER_CONFIG, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def copy_talk(weights: Path, out: Path) -> None:
    """How weights are spoken to, where their folder says it: chat template and what ends an answer."""
    for name in (CHAT_TEMPLATE_FILE, GENERATION_CONFIG):
        if (weights / name).is_file():
            shutil.copyfile(weights / name, out / name)


def write_named_template(name: str, base: Path, out: Path) -> None:
    """The named template that weights were trained with, as the chat template of their folder, and what ends it."""
    template, tokenizer = NamedTemplate.load(name, base), TextTokenizer.load(base)
    atomic_write_text(out / CHAT_TEMPLATE_FILE, as_jinja(template))
    config = json_object(out / GENERATION_CONFIG)
    known = config.get("eos_token_id")
    words = (template.special_tokens.get("eos_token", ""), *template.stop)
    stops = [stop for stop in map(tokenizer.token_id, words) if stop is not None]
    named = known if isinstance(known, list) else [] if known is None else [known]
    atomic_write_json(out / GENERATION_CONFIG, config | {"eos_token_id": list(dict.fromkeys([*named, *stops]))})


def tokenizer_bytes(base: Path) -> int:
    return sum((base / name).stat().st_size for name in TOKENIZER_FILES if (base / name).is_file())


def own_dtype(folder: Path) -> torch.dtype:
    """The number format that a model's config names; float32 when it names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One safetensors file; equal tensors give equal bytes."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same numbers in a file without a name in `folder`: the system takes their memory back when it needs it.

    Raises OSError when the disk is full.
    """
    if not tensor.numel():
        return tensor
    with NamedTemporaryFile(dir=folder, prefix=".tmp-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here, and a signal later
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def weights_hash(folder: Path) -> str:
    """sha256 of the weights in a folder: of the file when there is one, else over the names and hashes of all."""
    hashes = [(path.name, sha256_of(path)) for path in sorted(folder.glob("*.safetensors"))]
    if not hashes:
        raise CheckpointError(f"{str(folder)!r} holds no safetensors weights.", "Convert the checkpoint first.")
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in hashes).encode()).hexdigest()


def seal(out: Path, card: str, values: dict[str, Any]) -> dict[str, Any]:
    """Write the model card and, last, retune_weights.json: whose weights these are, their hash, the files we made."""
    atomic_write_text(out / CARD_FILE, card)
    files = sorted(path.name for path in out.iterdir())
    record = {"sha256": weights_hash(out), **values, "versions": versions(), "files": files}
    atomic_write_json(out / WEIGHTS_FILE, record)
    return record


def read_seal(folder: Path) -> dict[str, Any]:
    """What retune_weights.json says, {} when there is none. Raises CheckpointError when the weights changed since."""
    record = json_object(folder / WEIGHTS_FILE)
    if record and record.get("sha256") != weights_hash(folder):
        raise CheckpointError(
            f"The weights in {str(folder)!r} are damaged: they do not have the hash in {WEIGHTS_FILE}.",
            "Convert the checkpoint again.",
        )
    return record
