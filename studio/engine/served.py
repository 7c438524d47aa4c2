"""The weights that a model server answers with: one base, adapters on it, and full models beside it."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from studio.data.talk import mismatch
from studio.engine.adapters import load_adapter, take_off
from studio.engine.allocator import give_back_memory
from studio.engine.chat import context_limit
from studio.engine.mixing import BASE_ADAPTER, RowAdapters
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.selftest import Witness
from studio.engine.thin import thin_out
from studio.engine.weights import read_seal, weights_hash
from studio.errors import ModelError
from studio.models import model_fingerprint
from studio.weight_folders import ADAPTER_CONFIG

BASE_NAME = "base"
_NAME = re.compile(r"[\w][\w.:/@+-]{0,119}")


@dataclass(frozen=True)
class Weights:
    """One name that a request may ask for. `adapter` is PEFT's name for it, BASE_ADAPTER for the base itself.

    `warnings` say why its answers may be worse than they should be.
    """

    name: str
    folder: Path
    hash: str
    adapter: str = BASE_ADAPTER
    is_full_model: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """base, adapter, or model: one that has weights of its own."""
        return "model" if self.is_full_model else "base" if self.adapter == BASE_ADAPTER else "adapter"


@dataclass
class Ready:
    """What computes: a transformers model, wrapped when it has adapters, with its tokenizer and template."""

    loaded: LoadedModel
    model: nn.Module
    adapters: RowAdapters

    @property
    def context_limit(self) -> int:
        return context_limit(self.loaded)


class ModelPool:
    """Names to weights. Only the scheduler's thread may change it or ask it for a model; `find` and `listed` may be
    called from anywhere."""

    def __init__(
        self,
        base_name: str,
        base_folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        template: str = "",
        bits: int = 0,
        offload_folder: Path | None = None,
    ) -> None:
        """`template` names the one to speak to all of them in; "" speaks to each as it was trained."""
        self._template = template
        self._options: dict[str, Any] = {
            "dtype": dtype, "device": device, "template": template, "bits": bits, "offload_folder": offload_folder
        }  # fmt: skip
        fingerprint = model_fingerprint(base_folder)
        self._base_weights = Weights(base_name, base_folder, fingerprint, warnings=self._warnings(base_folder))
        self._weights: dict[str, Weights] = {base_name: self._base_weights}
        self._numbers = itertools.count(1)
        self._full: dict[str, Ready] = {}
        self._witness: Witness | None = None
        self._spoken_to: dict[str, LoadedModel] = {}  # the base, spoken to as an adapter was trained
        self._base: Ready | None = None
        self._load_base()

    @property
    def is_loaded(self) -> bool:
        """Whether weights are in memory."""
        return self._base is not None

    def add(self, name: str, folder: Path) -> Weights:
        """Put an adapter on the base, or note a full model that is loaded when it is first asked. Raises ModelError."""
        if not _NAME.fullmatch(name) or name == BASE_NAME:
            raise ModelError(f"{name!r} cannot name a model on the server.", "Use letters, digits, -, _, . and :.")
        known = self._weights.get(name)
        if known and known.folder.resolve() != folder.resolve():
            raise ModelError(f"The server has other weights under the name {name!r}.", "Choose another name.")
        if known:
            return known
        weights = self._described(name, folder)
        if not weights.is_full_model:
            self._put_on(self._load_base(), weights)
        self._weights = {**self._weights, name: weights}  # replaced as a whole: other threads read it
        return weights

    def batch_of(self, weights: Weights) -> str:
        """Which batch these answer in, by name: the base and its adapters share "" where their layers can mix them."""
        shares = not weights.is_full_model and self._load_base().adapters.can_mix
        return "" if shares else weights.name

    def remove(self, name: str) -> None:
        """Forget an adapter or a full model, and free its memory. Raises ModelError; the base stays."""
        weights = self.find(name)
        if weights == self._base_weights:
            raise ModelError("The base model cannot be taken out of its server.", "Stop the server instead.")
        self._weights = {each: kept for each, kept in self._weights.items() if each != name}
        self._spoken_to.pop(name, None)
        self._full.pop(name, None)
        if self._base and not weights.is_full_model:
            self._base.model = take_off(self._base.model, weights.adapter)
            self._base.adapters.renew(self._base.model)
        give_back_memory()

    def unload(self) -> None:
        """Let go of all weights; the next one that is asked for loads them again."""
        self._base = None
        self._full.clear()
        self._spoken_to.clear()
        give_back_memory()

    def find(self, name: str) -> Weights:
        """The weights of a name; `base` always names the base. Raises ModelError, naming what there is."""
        found = self._base_weights if name == BASE_NAME else self._weights.get(name)
        if found is None:
            raise ModelError(f"There is no model {name!r} on this server.", f"There are: {', '.join(self._weights)}.")
        return found

    def listed(self) -> list[Weights]:
        """All weights, the base first."""
        return list(self._weights.values())

    @property
    def base(self) -> Weights:
        """The base's own."""
        return self._base_weights

    @property
    def bits(self) -> int:
        """4 or 8 where the base's linear layers are squeezed, 0 where they are as stored."""
        return int(self._options["bits"])

    def self_test(self) -> dict[str, Any]:
        """With the adapters off, are the logits the base's: see `Witness.testify`."""
        base = self._load_base()
        self._witness = self._witness or Witness(base)
        adapters = {
            one.name: one.adapter for one in self.listed() if not one.is_full_model and one.adapter != BASE_ADAPTER
        }
        found = self._witness.testify(base, adapters)
        return {"base": self.base.name, "base_fingerprint": self.base.hash} | found

    def ready(self, weights: Weights) -> Ready:
        """The model that computes for these weights, loaded now when it is not in memory."""
        if not weights.is_full_model:
            base = self._load_base()
            return replace(base, loaded=self._spoken_to.get(weights.name, base.loaded))
        if weights.name not in self._full:
            self._full[weights.name] = _loaded(weights.folder, self._options)
        return self._full[weights.name]

    def _load_base(self) -> Ready:
        """The base with its adapters; loaded again when it was unloaded."""
        if self._base is None:
            self._base = _loaded(self._base_weights.folder, self._options)
            for weights in self._weights.values():
                if weights.adapter != BASE_ADAPTER:
                    self._put_on(self._base, weights)
        return self._base

    def _put_on(self, base: Ready, weights: Weights) -> None:
        """An adapter on the base."""
        self._witness = self._witness or Witness(base)
        base.model = load_adapter(base.model, weights.folder, weights.adapter).eval().requires_grad_(False)
        base.adapters.renew(base.model)
        loaded = base.loaded
        self._spoken_to[weights.name] = loaded if self._template else loaded.with_template_of(weights.folder)

    def _described(self, name: str, folder: Path) -> Weights:
        if not folder.is_dir():
            raise ModelError(f"There are no weights in {str(folder)!r}.", "Convert the checkpoint first.")
        made = read_seal(folder)
        digest = str(made.get("sha256") or weights_hash(folder))
        if not (folder / ADAPTER_CONFIG).is_file():
            return Weights(name, folder, digest, is_full_model=True, warnings=self._warnings(folder))
        adapter = f"adapter_{next(self._numbers)}"  # PEFT's names allow no dots
        return Weights(name, folder, digest, adapter, warnings=self._warnings(folder, made))

    def _warnings(self, folder: Path, adapter_seal: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
        """Whether weights are spoken to, and stand on a base, other than they were trained with."""
        found = [mismatch(folder, self._template)]
        trained_on = adapter_seal.get("base_fingerprint")
        if trained_on and trained_on != self._base_weights.hash:
            found.append(f"{folder.name} was trained on another base model than {self._base_weights.name}.")
        return tuple(filter(None, found))


def _loaded(folder: Path, options: Mapping[str, Any]) -> Ready:
    """A model that only answers from here on."""
    loaded = load_base(folder, **options)
    # torch multiplies in another order where a weight could be trained
    model = loaded.model.eval().requires_grad_(False)
    thin_out(model)
    return Ready(loaded, model, RowAdapters(model))
