"""Tensors of files that the studio did not write, read one by one: XTuner's `.pth` and folders of DeepSpeed."""

from collections.abc import Iterator, Mapping

import torch

from studio.foreign.deepspeed_folder import Piece, Weight
from studio.foreign.pickles import StoredTensor


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
