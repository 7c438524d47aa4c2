"""Under what circumstances a run computed, and a fingerprint of what it learned: what a second run is held against."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from studio import machine
from studio.engine.loop import Trainer
from studio.engine.models.load import LoadedModel
from studio.models import model_fingerprint


def circumstances(loaded: LoadedModel, trainer: Trainer) -> dict[str, Any]:
    """What `machine.surroundings` says, and what is known only with model and device in hand; fingerprints are sha256
    in hex. Equal circumstances give equal numbers on a CPU in float32."""
    return {
        **machine.surroundings(),
        "device": loaded.device.type,
        "threads": str(torch.get_num_threads()),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": trainer.forward.kind,
        "compiled": "no" if trainer.forward.why_not_compiled else "yes",
        "packing": trainer.packing,
        "processes": str(trainer.ranks.world),
        "base": model_fingerprint(loaded.folder),
        "template": loaded.template.fingerprint,
    }


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of weights; "" for none."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest() if weights else ""
