"""The weights that a model server answers with: one base, adapters on it, and full models beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from studio.data.talk import mismatch
from studio.engine.adapters import load_adapter
from studio.engine.chat import context_limit
from studio.engine.generate import BASE_ADAPTER
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.selftest import Witness
from studio.engine.weights import ADAPTER_CONFIG, read_seal, weights_hash
from studio.errors import ModelError
from studio.models import model_fingerprint

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


@dataclass
class Ready:
    """What computes: a transformers model, wrapped when it has adapters, with its tokenizer and template."""

    loaded: LoadedModel
    model: nn.Module

    @property
    def context_limit(self) -> int:
        return context_limit(self.loaded)


class ModelPool:
    """Names to weights. Only the scheduler's thread may change it; `find` and `listed` may be called from anywhere."""

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
        self._options: dict[str, Any] = {"template": template, "bits": bits, "offload_folder": offload_folder}
        loaded = load_base(base_folder, dtype=dtype, device=device, **self._options)
        loaded.model.requires_grad_(False)  # torch multiplies in another order where a weight could be trained
        self._base = Ready(loaded, loaded.model)
        fingerprint = model_fingerprint(base_folder)
        self._base_weights = Weights(base_name, base_folder, fingerprint, warnings=self._warnings(base_folder))
        self._full: dict[str, Ready] = {}
        self._witness: Witness | None = None
        self._spoken_to: dict[str, LoadedModel] = {}  # the base, spoken to as an adapter was trained
        self._weights: dict[str, Weights] = {base_name: self._base_weights}

    def add(self, name: str, folder: Path) -> Weights:
        """Put an adapter on the base, or note a full model that is loaded when it is first asked. Raises ModelError."""
        if not _NAME.fullmatch(name) or name == BASE_NAME:
            raise ModelError(f"{name!r} cannot name a model on the server.", "Use letters, digits, -, _, . and :.")
        known = self._weights.get(name)
        if known and known.folder.resolve() != folder.resolve():
            raise ModelError(f"The server has other weights under the name {name!r}.", "Choose another name.")
        if known:
            return known
        weights = self._load(name, folder)
        self._weights = {**self._weights, name: weights}  # replaced as a whole: other threads read it
        return weights

    def _load(self, name: str, folder: Path) -> Weights:
        if not folder.is_dir():
            raise ModelError(f"There are no weights in {str(folder)!r}.", "Convert the checkpoint first.")
        made = read_seal(folder)
        digest = str(made.get("sha256") or weights_hash(folder))
        if not (folder / ADAPTER_CONFIG).is_file():
            return Weights(name, folder, digest, is_full_model=True, warnings=self._warnings(folder))
        self._witness = self._witness or Witness(self._base.loaded)
        given = bool(self._options["template"])
        spoken_to = self._base.loaded if given else self._base.loaded.with_template_of(folder)
        self._spoken_to[name] = spoken_to
        self._base.loaded.eos_ids = spoken_to.eos_ids  # base and adapters answer in one batch
        adapter = f"adapter_{len(self._weights)}"  # PEFT's names allow no dots
        self._base.model = load_adapter(self._base.model, folder, adapter)
        return Weights(name, folder, digest, adapter, warnings=self._warnings(folder, made))

    def _warnings(self, folder: Path, adapter_seal: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
        """Whether weights are spoken to, and stand on a base, other than they were trained with."""
        found = [mismatch(folder, self._options["template"])]
        trained_on = adapter_seal.get("base_fingerprint")
        if trained_on and trained_on != self._base_weights.hash:
            found.append(f"{folder.name} was trained on another base model than {self._base_weights.name}.")
        return tuple(filter(None, found))

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
        return self._base_weights

    @property
    def bits(self) -> int:
        """4 or 8 where the base's linear layers are squeezed, 0 where they are as stored."""
        return int(self._options["bits"])

    def self_test(self) -> dict[str, Any]:
        """With the adapters off, are the logits the base's: see `Witness.testify`."""
        self._witness = self._witness or Witness(self._base.loaded)
        adapters = {
            one.name: one.adapter for one in self.listed() if not one.is_full_model and one.adapter != BASE_ADAPTER
        }
        found = self._witness.testify(self._base.model, adapters)
        return {"base": self.base.name, "base_fingerprint": self.base.hash} | found

    def ready(self, weights: Weights) -> Ready:
        """The model that computes for these weights; a full model is loaded now if it was not yet."""
        if not weights.is_full_model:
            return Ready(self._spoken_to.get(weights.name, self._base.loaded), self._base.model)
        if weights.name not in self._full:
            base = self._base.loaded
            loaded = load_base(weights.folder, dtype=base.dtype, device=base.device, **self._options)
            self._full[weights.name] = Ready(loaded, loaded.model)
        return self._full[weights.name]
