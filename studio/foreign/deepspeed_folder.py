"""A checkpoint folder of DeepSpeed (`iter_96.pth/`, `step_40.pth/`), opened without DeepSpeed: whole weights again.

ZeRO cuts the float32 weights into one flat piece a rank. Where each weight lies in the pieces is worked out here, from
what the files say; nothing is read until `studio.engine.foreign.read_weight` is asked for one.

Layouts: `mp_rank_00_model_states.pt` with `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` for ZeRO 1 and 2,
`zero_pp_rank_R_mp_rank_00_model_states.pt` beside the latter for ZeRO 3, the first alone without ZeRO.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import CheckpointError
from studio.foreign.pickles import StandIn, StoredTensor
from studio.foreign.torch_file import TorchFile, open_dictionary

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_?model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MAX_RANKS = 4096
HINT = "Copy the whole folder again from where it came, with the files of every rank."


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + num_elements` of a flat (contiguous) tensor."""

    tensor: StoredTensor
    start: int
    num_elements: int


@dataclass(frozen=True)
class Weight:
    """A weight that was not read yet: its shape, and the pieces that follow each other in it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> str:
        """torch's name of the number format, as `float32`."""
        return self.pieces[0].tensor.dtype if self.pieces else "float32"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def whole(tensor: StoredTensor) -> Weight:
    """A weight that is one stored tensor."""
    return Weight(tensor.shape, (Piece(tensor, 0, tensor.num_elements),))


class DeepSpeedFolder:
    """`content`: what the first rank's model file says beside the weights (steps, configs, what the trainer added).

    `weights`: every weight in it by name: trained ones in float32 from the optimizer's pieces, frozen ones and buffers
    as they were stored. `stage` is ZeRO's, 0 without it; `world_size` the number of ranks.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when files are missing, damaged or do not fit together, UnsafeFileError for code."""
        self.folder = Path(folder)
        self.models = _by_rank(self.folder, MODEL_FILE)
        self.optimizers = _by_rank(self.folder, OPTIMIZER_FILE)
        if not self.models:
            raise CheckpointError(f"{self.folder.name} holds no model_states.pt of DeepSpeed.", HINT)
        self.content: dict[str, Any] = self.models[0].content
        self.stage = self._stage()
        self.world_size = max(len(self.optimizers), 1)
        self.weights = self._weights()

    def optimizer_state(self, rank: int) -> dict[str, Any]:
        """What a rank's optimizer file says: pieces of the weights and of the optimizer's own numbers."""
        state = self.optimizers[rank].content.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise self._odd(f"{self.optimizers[rank].path.name} holds no optimizer_state_dict")
        return state

    def _stage(self) -> int:
        if not self.optimizers:
            return 0
        stage = self.optimizer_state(0).get("zero_stage")
        if stage not in (1, 2, 3):
            raise self._odd(f"zero_stage is {stage!r}")
        ranks = self.optimizer_state(0).get("partition_count", len(self.optimizers))
        ranks = max(ranks) if isinstance(ranks, list | tuple) and ranks else ranks
        if ranks != len(self.optimizers):
            raise self._odd(f"it was written by {ranks} ranks, and {len(self.optimizers)} optimizer files are here")
        if stage == 3 and len(self.models) != len(self.optimizers):
            raise self._odd(f"{len(self.optimizers)} ranks have {len(self.models)} model files")
        return int(stage)

    def _weights(self) -> dict[str, Weight]:
        """Those of the optimizer, which are exact, before those of the model file, which may be rounded."""
        found = self._stored() | self._frozen()
        if self.stage:
            found |= self._trained_in_shares() if self.stage == 3 else self._trained()
        for name, source in self._shared():
            if source in found:
                found[name] = found[source]
        if not found:
            raise self._odd("it holds no weights")
        return found

    def _stored(self) -> dict[str, Weight]:
        """What the model file holds itself. In ZeRO 3 weights are empty there, and only buffers count."""
        module = self.content.get("module")
        if not isinstance(module, dict):
            raise self._odd("its model file holds no module")
        names = module if self.stage < 3 else self.content.get("buffer_names") or []
        return {str(name): whole(module[name]) for name in names if isinstance(module.get(name), StoredTensor)}

    def _shared(self) -> list[tuple[str, str]]:
        shared = self.content.get("shared_params") or {}
        return list(shared.items()) if isinstance(shared, dict) else [tuple(pair) for pair in shared]

    def _trained(self) -> dict[str, Weight]:
        """ZeRO 1 and 2: each group of weights is one long flat tensor, cut into as many pieces as there are ranks."""
        states = [self.optimizer_state(rank) for rank in range(self.world_size)]
        found = {}
        for group, shapes in enumerate(self._param_shapes()):
            flats = [self._flat(state.get("single_partition_of_fp32_groups"), group) for state in states]
            maps = [_at(state.get("param_slice_mappings"), group) for state in states]
            if all(isinstance(each, dict) for each in maps):
                found |= self._by_addresses(shapes, flats, maps)
            else:
                found |= self._by_order(shapes, flats)
        return found

    def _by_addresses(
        self, shapes: dict[str, tuple[int, ...]], flats: list[StoredTensor], maps: list[dict[str, Any]]
    ) -> dict[str, Weight]:
        """DeepSpeed wrote down where each weight lies in each rank's piece."""
        found = {}
        for name, shape in shapes.items():
            addresses = [(flat, _address(each[name])) for flat, each in zip(flats, maps, strict=True) if name in each]
            found[name] = self._weight(name, shape, [Piece(flat, start, count) for flat, (start, count) in addresses])
        return found

    def _by_order(self, shapes: dict[str, tuple[int, ...]], flats: list[StoredTensor]) -> dict[str, Weight]:
        """Older files: the weights follow each other in the order of their shapes; what is left over is padding."""
        found, start = {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            found[name] = self._weight(name, shape, list(_cut(flats, start, count)))
            start += count
        return found

    def _trained_in_shares(self) -> dict[str, Weight]:
        """ZeRO 3: each weight is cut evenly, the last rank's share padded; a rank's shares follow each other."""
        flats = [_tensors(self.optimizer_state(rank).get("fp32_flat_groups")) for rank in range(self.world_size)]
        found, start = {}, 0
        for shapes in self._param_shapes():
            for name, shape in shapes.items():
                count = math.prod(shape)
                share = -(-count // self.world_size)
                counts = [max(0, min(share, count - rank * share)) for rank in range(self.world_size)]
                pieces = [piece for flat, part in zip(flats, counts, strict=True) for piece in _cut(flat, start, part)]
                found[name] = self._weight(name, shape, pieces)
                start += share
        return found

    def _frozen(self) -> dict[str, Weight]:
        """Weights that were not trained, where the run chose to keep them."""
        shapes = self.content.get("frozen_param_shapes") or {}
        models = self.models if self.stage == 3 else self.models[:1]
        found = {}
        for name, shape in shapes.items():
            fragments = [(model.content.get("frozen_param_fragments") or {}).get(name) for model in models]
            tensors = [tensor for tensor in fragments if isinstance(tensor, StoredTensor)]
            found[name] = self._weight(name, tuple(shape), list(_cut(tensors, 0, math.prod(shape))))
        return found

    def _weight(self, name: str, shape: tuple[int, ...], pieces: list[Piece]) -> Weight:
        """Pieces that make up the shape, each inside its tensor."""
        fits = all(each.tensor.is_contiguous and _end(each) <= each.tensor.num_elements for each in pieces)
        if not fits or sum(each.num_elements for each in pieces) != math.prod(shape):
            raise self._odd(f"the pieces of {name} do not make up its shape {shape}")
        if len({each.tensor.dtype for each in pieces}) > 1:
            raise self._odd(f"the pieces of {name} differ in number format")
        return Weight(shape, tuple(each for each in pieces if each.num_elements))

    def _param_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        groups = self.content.get("param_shapes")
        groups = [groups] if isinstance(groups, dict) else groups
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise self._odd("its model file says no param_shapes")
        return groups

    def _flat(self, groups: Any, group: int) -> StoredTensor:
        tensor = _at(groups, group)
        if not isinstance(tensor, StoredTensor):
            raise self._odd(f"group {group} of the weights is missing in an optimizer file")
        return tensor

    def _odd(self, reason: str) -> CheckpointError:
        return CheckpointError(f"The DeepSpeed folder {self.folder.name} cannot be used: {reason}.", HINT)


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[TorchFile]:
    """The opened files of a kind, rank 0 first. Raises CheckpointError for gaps and for what was cut by tensors too."""
    found = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if match := pattern.fullmatch(path.name):
            if int(match[2]) != 0:
                raise CheckpointError(
                    f"{folder.name} is of a model that was spread over devices by tensors ({path.name}).",
                    "Such folders cannot be put together here; gather the weights where they were trained.",
                )
            rank = int(match[1] or 0)
            if rank in found:
                raise CheckpointError(f"{folder.name} has two files of rank {rank}: {path.name} is one.", HINT)
            found[rank] = path
    if sorted(found) != list(range(len(found))) or len(found) > MAX_RANKS:
        missing = min(set(range(len(found))) - set(found), default=len(found))
        raise CheckpointError(f"{folder.name} lacks the file of rank {missing}.", HINT)
    return [open_dictionary(found[rank]) for rank in range(len(found))]


def _cut(flats: list[StoredTensor], start: int, count: int) -> Iterator[Piece]:
    """The pieces that hold `count` elements from `start` on of tensors that are thought of as one."""
    for flat in flats:
        here = max(0, min(count, flat.num_elements - start))
        if here:
            yield Piece(flat, start, here)
        count -= here
        start = max(0, start - flat.num_elements)


def _tensors(value: Any) -> list[StoredTensor]:
    """The tensors of a list, perhaps of lists, in order."""
    if isinstance(value, StoredTensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []


def _address(value: Any) -> tuple[int, int]:
    state = value.state if isinstance(value, StandIn) else {}
    start, count = state.get("start"), state.get("numel")
    if not isinstance(start, int) or not isinstance(count, int) or start < 0 or count < 0:
        raise CheckpointError("An optimizer file of DeepSpeed does not say where a weight lies.", HINT)
    return start, count


def _end(piece: Piece) -> int:
    return piece.start + piece.num_elements


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list | tuple) and index < len(values) else None
