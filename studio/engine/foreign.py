"""Tensors of files that the studio did not write, read one by one: XTuner's `.pth` and folders of DeepSpeed."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from studio.engine.checkpoint import FORMAT
from studio.engine.models.families import Native
from studio.errors import CheckpointError
from studio.foreign.deepspeed_folder import Piece, Weight
from studio.foreign.pickles import StoredTensor
from studio.foreign.xtuner import XTunerCheckpoint
from studio.paths import slugify


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor; its bytes are mapped from the file, so reading one costs no memory until it is used.

    Raises CheckpointError when the bytes do not have their checksum.
    """
    dtype = getattr(torch, stored.dtype)
    data = stored.storage.file.bytes_of(stored.storage)
    if not stored.num_elements:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).as_strided(stored.shape, stored.stride, stored.offset)


def read_weight(weight: Weight) -> torch.Tensor:
    """A whole weight, put together from its pieces. Raises CheckpointError as `read_tensor` does."""
    pieces = [_read_piece(piece) for piece in weight.pieces]
    if not pieces:
        return torch.empty(weight.shape, dtype=getattr(torch, weight.dtype))
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat.reshape(weight.shape)


def iter_weights(weights: Mapping[str, Weight]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each weight; no more than one is put together at a time."""
    for name, weight in weights.items():
        yield name, read_weight(weight)


def _read_piece(piece: Piece) -> torch.Tensor:
    tensor = read_tensor(piece.tensor)
    if piece.num_elements == tensor.numel():
        return tensor.reshape(-1)  # as it lies, or in order when it was stored as a view
    return tensor.reshape(-1)[piece.start : piece.start + piece.num_elements]


def in_our_format(
    found: XTunerCheckpoint, base: str, dtype: torch.dtype | None = None, run_id: str = "", base_fingerprint: str = ""
) -> dict[str, Any]:
    """A checkpoint of XTuner as the studio writes them, without what a resume needs: the weights, and what they are.

    `dtype` None keeps the numbers as they were trained. Weights are read and cast one by one.
    Raises CheckpointError for parts beside the language model, and for numbers that do not fit `dtype`.
    """
    if found.others:
        raise CheckpointError(
            f"{found.path.name} also holds weights of {', '.join(found.others)}, which cannot be taken along yet.",
            "Only weights of the language model (llm.) can.",
        )
    name = slugify(found.name or found.path.stem)
    meta = {
        "format": FORMAT,
        "step": found.step or found.iteration,
        "run_id": run_id,
        "method": found.method,
        "base": base,
        "base_fingerprint": base_fingerprint,
        "config": found.run_config(base or "unknown/base", name).model_dump(mode="json"),
        "adapter_config": found.adapter_config() if found.is_adapter else None,
        "versions": {"xtuner checkpoint": found.path.name},
        "origin": {key: value for key, value in found.facts().items() if value not in ("", None, [], {})},
    }
    state = {name: cast(tensor, dtype, name, found.path.name) for name, tensor in iter_weights(found.weights)}
    return {"meta": meta, "state_dict": state, "data": {"fingerprints": {}}}


def in_layout(content: dict[str, Any], layout: Native | None) -> dict[str, Any]:
    """The same by the names of the class that computes the base here, where its family has a layout of its own."""
    if layout is None:
        return content
    meta = dict(content["meta"])
    if isinstance(meta.get("adapter_config"), dict):
        targets = layout.renamed_targets(meta["adapter_config"]["target_modules"])
        meta["adapter_config"] = meta["adapter_config"] | {"target_modules": targets}
    return content | {"meta": meta, "state_dict": layout.translated(content["state_dict"])}


def cast(tensor: torch.Tensor, dtype: torch.dtype | None, name: str, what: str) -> torch.Tensor:
    """A weight in another number format; None keeps its own. Raises CheckpointError where that makes it infinite."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # a view of the file's flat piece would be saved with all of it
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(cast).all():
        raise CheckpointError(
            f"{name} in {what} holds numbers that {str(dtype).removeprefix('torch.')} cannot.",
            "Write float32 (--fp32), or bfloat16.",
        )
    return cast
