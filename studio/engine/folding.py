"""A base and its adapter as one model, read and folded one weight at a time: memory holds a layer, never a model.

PEFT's own layers do the sums. They stand on a model of hollow weights (every number of one is the same zero), and each
is given its own only while it folds; so whatever PEFT can merge (LoRA, rsLoRA, DoRA, saved modules), this can too.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from studio.engine.adapter_files import Adapter
from studio.engine.models.families import HEAD, OWN_LAYOUT, Native, is_derived, native
from studio.engine.safe_load import load_pth
from studio.errors import CheckpointError, ModelError
from studio.model_code import is_trusted
from studio.weight_folders import IMPORTING_SETTINGS, weight_files

EMBEDDING = "model.embed_tokens.weight"


class StoredWeights:
    """The tensors of a model folder by transformers' names, each read from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.layout = native(folder)
        self._whole: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        shards, kind = weight_files(folder)
        for shard in shards:
            self._look_into(shard, kind)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises CheckpointError for a damaged file."""
        path, stored = self._places[name]
        return _renamed(self.layout, stored, self._stored(path, stored))[name]

    def _look_into(self, shard: Path, kind: str) -> None:
        if kind == "bin":
            self._whole |= load_pth(shard)  # mapped from the disk, not read
        for stored, shape in _shapes(shard, self._whole if kind == "bin" else None):
            if is_derived(stored):
                continue
            for name, piece in _renamed(self.layout, stored, torch.empty(shape, device="meta")).items():
                self._places[name], self.shapes[name] = (shard, stored), piece.shape

    def _stored(self, path: Path, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path.name} is damaged: {error}.", "Fetch the model again.") from error


class LoadedWeights:
    """The tensors of a model in memory, for architectures whose files name them otherwise (experts stacked in one)."""

    layout = None

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in self._state.items()}
        self.names = list(self._state)

    def read(self, name: str) -> Tensor:
        return self._state[name]


class FoldedWeights:
    """The weights of base + adapter, or of the base alone. `names` and `shapes` are those of the finished model.

    `rounded_to`: the base's weights are rounded to it before anything is added. `squeezed`: the linear layers are
    those of the 4-bit base that a QLoRA adapter was trained on. `is_streamable`: the files name the weights as
    transformers does; where they do not, give the model in memory as `loaded`. `config` describes the finished model:
    where an adapter parts an embedding from the output head that was tied to it (`is_parted`), both are written.
    Raises CheckpointError when not every tensor of the adapter finds its place.
    """

    def __init__(
        self,
        base: Path,
        adapter: Adapter | None = None,
        rounded_to: torch.dtype | None = None,
        squeezed: bool = False,
        loaded: LoadedWeights | None = None,
    ) -> None:
        self.stored = loaded or StoredWeights(base)
        self.config = model_config(base)
        self.rounded_to, self._squeezed = rounded_to, squeezed
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=is_trusted(base))
        self.architecture = type(model).__name__
        if layout := native(base):
            setattr(model, OWN_LAYOUT, layout)
        self._linear = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        parameters, buffers = (
            {name for name, _ in found} for found in (model.named_parameters(), model.named_buffers())
        )
        own = set(self.stored.names)
        self.is_streamable = own <= {*parameters, *buffers, HEAD} and parameters <= {*own, HEAD}
        self._layers: dict[str, nn.Module] = {}
        self._instead: dict[str, Tensor] = {}
        if adapter is not None:
            self._wear(model, adapter)
        self.names = [name for name in self.stored.names if not (name == HEAD and self.config.tie_word_embeddings)]
        self._part_tied()

    @property
    def changed(self) -> list[str]:
        """Names of the weights that are not the base's."""
        return [*self._layers, *self._instead]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: self._shape(name) for name in self.names}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One weight: folded ones in float32, others as they are stored (rounded, where that was asked for).

        Raises CheckpointError when folding makes it infinite or NaN.
        """
        if name in self._instead:
            return self._instead[name]
        if name not in self._layers:
            return self._base(name)
        # PEFT adds in place, and what was read may be the base's own memory: of a .bin file, or of a loaded model.
        weight = _folded(self._layers[name], self._base(name).to(torch.float32, copy=True))
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"Folding makes {name} infinite or NaN.", "Use an earlier checkpoint.")
        return weight

    def before(self, name: str) -> Tensor | None:
        """The base's weight where the adapter adds to one, None elsewhere."""
        return self._base(name) if name in self._layers else None

    def _shape(self, name: str) -> torch.Size:
        return self._instead[name].shape if name in self._instead else self.stored.shapes[self._source(name)]

    def _source(self, name: str) -> str:
        """Where the base has a weight: a head that was tied to the embedding lies there."""
        return EMBEDDING if name == HEAD and name not in self.stored.shapes else name

    def _base(self, name: str) -> Tensor:
        weight = self.stored.read(self._source(name))
        if self.rounded_to is not None and weight.is_floating_point():
            weight = weight.to(self.rounded_to)
        return squeeze(weight) if self._squeezed and name in self._linear and name != HEAD else weight

    def _wear(self, model: nn.Module, adapter: Adapter) -> None:
        """Put the adapter on the hollow model, and note which weights it changes."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        _hollow(model, adapter.config.get("modules_to_save") or ())
        pair = attach(model, adapter)
        for name, module in pair.base_model.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                self._layers[f"{name}.weight"] = module.float()
                if adapter.config.get("bias", "none") != "none" and module.get_base_layer().bias is not None:
                    self._instead[f"{name}.bias"] = module.get_base_layer().bias.detach()
            elif isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save["default"].named_parameters()
                self._instead |= {f"{name}.{part}": parameter.detach() for part, parameter in saved}

    def _part_tied(self) -> None:
        self.is_parted = bool(self.config.tie_word_embeddings and {EMBEDDING, HEAD} & set(self.changed))
        if self.is_parted:
            self.config.tie_word_embeddings = False
            self.names.append(HEAD)


def fill(model: nn.Module, weights: FoldedWeights) -> None:
    """Put what an adapter changes into a plain model."""
    state = model.state_dict()
    for name in weights.changed:
        state[name].copy_(weights.read(name))


def attach(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with the adapter on it. Raises CheckpointError when not every tensor finds its place."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    adapter = adapter.for_model(model)
    known = {key: value for key, value in adapter.config.items() if key not in IMPORTING_SETTINGS}
    try:
        config = LoraConfig.from_peft_type(**known)
        pair = PeftModel(model, config)
        result = set_peft_model_state_dict(pair, adapter.tensors)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise _does_not_fit(adapter, " ".join(str(error).split())[:300]) from error
    lacking = [name for name in result.missing_keys if "lora_" in name]
    if lacking or result.unexpected_keys:
        raise _does_not_fit(
            adapter, f"{lacking[0]} is missing" if lacking else f"{result.unexpected_keys[0]} has no place there"
        )
    return pair.eval()


def _does_not_fit(adapter: Adapter, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The adapter {adapter.folder.name!r} does not fit this base model: {reason}.",
        "Give the base that it was trained on.",
    )


def squeeze(weight: Tensor) -> Tensor:
    """What a linear layer's weight is in a 4-bit base (NF4, doubly quantised, as QLoRA trains on): float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).to(torch.float32)


def model_config(folder: Path) -> PretrainedConfig:
    """A folder's config in transformers' own class, for families with code of their own too."""
    if found := native(folder):
        return found.config
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=is_trusted(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"config.json of {folder.name!r} cannot be read: {error}.", "Fetch the model again."
        ) from error


def _hollow(model: nn.Module, whole: Iterable[str]) -> None:
    """Give every matrix its shape and no memory, but for modules that the adapter brings whole, and vectors."""
    endings = tuple(f".{name}" for name in whole)
    for name, module in model.named_modules():
        for part, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            is_whole = parameter.dim() < 2 or (endings and f".{name}".endswith(endings))
            zeros = torch.zeros(parameter.shape) if is_whole else torch.zeros(()).expand(parameter.shape)
            module._parameters[part] = nn.Parameter(zeros, requires_grad=False)


def _folded(layer: nn.Module, weight: Tensor) -> Tensor:
    """What PEFT makes of a layer's weight when it merges; the layer is hollow again afterwards."""
    inner = layer.get_base_layer()
    hollow = inner.weight
    inner.weight = nn.Parameter(weight, requires_grad=False)
    try:
        layer.merge()
        return inner.weight.data
    finally:
        inner.weight = hollow
        layer.merged_adapters.clear()


def _renamed(layout: Native | None, stored: str, tensor: Tensor) -> dict[str, Tensor]:
    return layout.state([(stored, tensor)]) if layout else {stored: tensor}


def _shapes(shard: Path, loaded: dict[str, Tensor] | None) -> Iterator[tuple[str, list[int]]]:
    if loaded is not None:
        yield from ((name, list(loaded[name].shape)) for name in sorted(loaded))
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_slice(name).get_shape()
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{shard.name} is damaged: {error}.", "Fetch the model again.") from error
