"""A run's checkpoint as a folder: DeepSpeed's files of every rank, and beside them what else a resume needs.

`step_N.pth/` has DeepSpeed's layout and XTuner's names (`llm.…`); `retune_state.pth` in it is `RunState` without
weights and optimizer. Weights are put together by the reader of foreign files, never by DeepSpeed's own.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from studio.checkpoint_files import STATE_FILE
from studio.engine.foreign import read_weight
from studio.engine.safe_load import load_pth
from studio.foreign.deepspeed_folder import Weight
from studio.foreign.xtuner import open_checkpoint

PROMPT_ENCODER, VIRTUAL_TOKENS = "prompt_encoder.", "prompt_embeddings"
LEARNED = (".lora_", ".modules_to_save", PROMPT_ENCODER)


class FolderWeights(Mapping[str, torch.Tensor]):
    """Weights by name, each put together from the pieces of all ranks when it is asked for, and kept by nobody here."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self.num_elements = sum(weight.num_elements for weight in weights.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_weight(self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_own(path: Path) -> dict[str, Any]:
    """The content of one of our checkpoints, file or folder, with its weights. Raises CheckpointError, UnsafeFileError.

    A folder's are `FolderWeights`, in float32, by the names that PEFT or transformers give them.
    """
    if not path.is_dir():
        return load_pth(path)
    content = load_pth(path / STATE_FILE)
    weights = open_checkpoint(path).weights
    if content["meta"]["adapter_config"]:  # tied names of the frozen base stand in the files too
        weights = {
            _saved_name(name): weight for name, weight in weights.items() if any(part in name for part in LEARNED)
        }
    return content | {"state_dict": FolderWeights(weights)}


def _saved_name(name: str) -> str:
    """Virtual tokens are saved by PEFT under a name of their own."""
    return VIRTUAL_TOKENS if PROMPT_ENCODER in name else name
