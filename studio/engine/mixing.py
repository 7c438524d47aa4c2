"""Base and adapters in one batch: one product with the base's weights for all rows, and a narrow one for the adapters.

PEFT can mix them too, but cuts the batch into pieces in every layer. Here the adapters that a batch uses are laid side
by side, and each row keeps what is its own: y = xW + (xA ⊙ gate)B, with A and B of all of them in one matrix each, also
those of layers that read the same input (`studio.engine.joint`). Layers with more to them (DoRA, biases, embeddings)
are computed by PEFT, the rows of each adapter on their own; so are experts that keep their weights as one, whose rows
must all wear the same.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from studio.engine.adapters import core_of
from studio.engine.joint import Joint, Worn, joint_of, keeps_rows_apart, rows_are_mixed

BASE_ADAPTER = "__base__"  # PEFT's name for a row that no adapter touches
SETTLED = 4  # batches of the same rows after which no other one is expected to take turns with them
Ranks = tuple[tuple[str, int], ...]  # (adapter, columns of the stack) in their order


class RowAdapters:
    """Sends every row through its adapter, in all forward passes after `send`, until `close`.

    On a GPU they compute in the base's number format. On a CPU in float32: narrow products in bfloat16 take several
    times as long there. The model is one of PEFT's with LoRA adapters, or has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[_Plain | _Apart] = []
        self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Look at the model again, after adapters came or went."""
        self.close()
        one = next(model.parameters())
        self._dtype = torch.float32 if one.device.type == "cpu" else one.dtype
        self._known = set(model.peft_config) if isinstance(model, PeftModel) else set()
        self._layers = [
            module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
        ]
        self._core = core_of(model)
        self._can_mix: bool | None = None
        self._names: list[str] = []
        self._stacked: list[str] = []
        self._num_sent = 0  # times that these names were sent, one after the other

    @property
    def can_mix(self) -> bool:
        """Whether rows of one batch may wear different adapters; tried on a few tokens when it is first asked."""
        if self._can_mix is None:
            self.close()
            self._names = []  # so that what is sent next is laid anew
            self._can_mix = not self._layers or keeps_rows_apart(self._core, self._layers)
        return self._can_mix

    def send(self, names: Sequence[str]) -> None:
        """Rows of the following batches wear these, BASE_ADAPTER none. Raises ValueError for unknown ones."""
        names = list(names)
        self._num_sent = self._num_sent + 1 if names == self._names else 1
        if names == self._names and self._num_sent != SETTLED:
            return
        used = sorted(set(names) - {BASE_ADAPTER})
        if unknown := set(used) - self._known:
            raise ValueError(f"no such adapter: {', '.join(sorted(unknown))}")
        if self._num_sent == SETTLED and used != self._stacked:
            self._stack(used)
        elif not self._parts or not set(used) <= set(self._stacked):
            # beside those of the batch before: a batch that reads its prompts and one that is answered take turns
            self._stack(sorted({*used, *self._names} - {BASE_ADAPTER}))
        self._names = names
        worn: dict[Ranks, Worn | None] = {}
        for part in self._parts:
            if part.ranks not in worn:
                worn[part.ranks] = _worn(part.ranks, self._names, part.device, self._dtype)
            part.send(self._names, worn[part.ranks])

    def wear(self, name: str) -> None:
        """All rows of all batches wear the adapter that the model wears too; what is not plain stays PEFT's."""
        self._stack([name])
        for part in self._parts:
            if isinstance(part, _Apart):
                part.close()
        self._parts = [part for part in self._parts if isinstance(part, _Plain)]
        for part in self._parts:
            part.send([name], Worn() if part.ranks else None)

    def close(self) -> None:
        """Every layer is PEFT's again."""
        for part in self._parts:
            part.close()
        self._parts = []

    @torch.inference_mode(False)  # what is laid in the middle of an answer may be changed at any time
    def _stack(self, adapters: list[str]) -> None:
        """Lay these side by side in every layer."""
        self.close()
        self._stacked = adapters
        joined: dict[Joint, dict[int, Any]] = {}
        for module in self._layers:
            if isinstance(module, LoraLayer):
                joint, number = joint_of(module.base_layer) or (_on_its_own(module), 0)
                joined.setdefault(joint, {})[number] = module
            else:
                self._parts.append(_Apart(module))
        for joint, modules in joined.items():
            self._parts += self._laid(joint, modules)

    def _laid(self, joint: Joint, modules: dict[int, Any]) -> Iterator["_Plain | _Apart"]:
        """Layers of one joint product; where PEFT must compute one of them, all are on their own."""
        plain = {number: _are_plain(module, self._stacked) for number, module in modules.items()}
        if all(plain.values()):
            yield _Plain(joint, modules, self._stacked, self._dtype)
            return
        for number, module in modules.items():
            if plain[number]:
                yield _Plain(_on_its_own(module), {0: module}, self._stacked, self._dtype)
            else:
                yield _Apart(module)


class _Plain:
    """PEFT's layers, by their number in a joint product, with y = xW + s·xAB of every adapter."""

    def __init__(self, joint: Joint, modules: dict[int, Any], adapters: Sequence[str], dtype: torch.dtype) -> None:
        self._joint, self._modules = joint, modules
        here = [(module, name) for _, module in sorted(modules.items()) for name in adapters if name in module.lora_A]
        self.ranks: Ranks = tuple((name, module.r[name]) for module, name in here)
        self.device = next(next(iter(modules.values())).parameters()).device
        if here:
            down = torch.cat([module.lora_A[name].weight.detach() for module, name in here]).to(dtype)
            ups = [_up(modules.get(number), size, adapters) for number, size in enumerate(joint.sizes)]
            joint.lay(down, [up.to(self.device, dtype) for up in ups])
        for number, module in modules.items():
            module.forward = partial(joint.forward, number)

    def send(self, names: list[str], worn: Worn | None) -> None:
        """Rows of a batch wear these; `worn` says it of this layer's adapters."""
        self._joint.send(worn)

    def close(self) -> None:
        self._joint.send(None)
        for module in self._modules.values():
            del module.forward


class _Apart:
    """A layer that PEFT computes."""

    ranks: Ranks = ()

    def __init__(self, module: Any) -> None:
        self._module = module
        self._forward = type(module).forward
        self._names: list[str] = []
        self.device = next(module.parameters()).device
        module.forward = self.forward

    def send(self, names: list[str], worn: Worn | None) -> None:
        self._names = names

    def close(self) -> None:
        del self._module.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows of each adapter on their own where PEFT cannot mix them, as with DoRA.

        Raises ValueError for different adapters where a layer mixes the rows of a batch.
        """
        if not isinstance(self._module, LoraLayer):
            return self._forward(self._module, x, *args, adapter_names=self._names, **kwargs)
        if len(set(self._names)) == 1:
            return self._alone(self._names[0], x, *args, **kwargs)
        if isinstance(self._module, ParamWrapper) or len(x) != len(self._names):
            raise rows_are_mixed()
        parts = {}
        for name in dict.fromkeys(self._names):
            rows = [row for row, each in enumerate(self._names) if each == name]
            parts.update(zip(rows, self._alone(name, x[rows], *args, **kwargs), strict=True))
        return torch.stack([parts[row] for row in range(len(self._names))])

    def _alone(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self._module
        if name not in module.lora_A and name not in module.lora_embedding_A:
            return module.base_layer(x, *args, **kwargs)
        worn, module._active_adapter = module._active_adapter, [name]
        try:
            return self._forward(module, x, *args, **kwargs)
        finally:
            module._active_adapter = worn


def _on_its_own(module: Any) -> Joint:
    return Joint(module.base_layer, [module.out_features])


def _up(module: Any, size: int, adapters: Sequence[str]) -> Tensor:
    """(ranks, size), scaled: of all adapters that a layer has; of no rank where it has none."""
    here = [name for name in adapters if module is not None and name in module.lora_A]
    scaled = [module.lora_B[name].weight.detach().t() * module.scaling[name] for name in here]
    return torch.cat(scaled) if scaled else torch.empty(0, size)


def _are_plain(module: Any, names: Sequence[str]) -> bool:
    return all(_is_plain(module, name) for name in names)


def _is_plain(module: Any, name: str) -> bool:
    """Whether an adapter is y = xW + s·xAB in this layer, or is not there at all."""
    if isinstance(module, ParamWrapper):  # its base takes and gives more than one tensor
        return False
    if name not in module.lora_A:
        return name not in module.lora_embedding_A
    return (
        name not in module.lora_variant
        and isinstance(module.lora_A[name], nn.Linear)
        and module.lora_B[name].bias is None
        and not getattr(module, "fan_in_fan_out", False)
    )


def _worn(ranks: Ranks, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Worn | None:
    """Which of the rows that wear `names` wear adapters of these ranks; None for no row."""
    owners = [owner for owner, rank in ranks for _ in range(rank)]
    wearing = [row for row, name in enumerate(names) if name in owners]
    if not wearing:
        return None
    first, end = wearing[0], wearing[-1] + 1
    values = [[float(owner == name) for owner in owners] for name in names[first:end]]
    if not all(map(all, values)):
        return Worn(first, end, len(names), torch.tensor(values, device=device, dtype=dtype))
    return Worn() if end - first == len(names) else Worn(first, end, len(names))
