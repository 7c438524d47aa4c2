"""Base and adapters in one batch: one product with the base's weights for all rows, and a narrow one for the adapters.

PEFT can mix them too, but cuts the batch into pieces in every layer. Here the adapters that a batch uses are laid side
by side, and each row keeps what is its own: y = xW + (xA ⊙ gate)B, with A and B of all of them in one matrix each.
Layers with more to them (DoRA, biases, embeddings) are computed by PEFT, the rows of each adapter on their own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE_ADAPTER = "__base__"  # PEFT's name for a row that no adapter touches
FEW_TOKENS = 64  # more of them are rounded to the base's format before they are added: 5 times as fast with 250


class RowAdapters:
    """Sends every row through its adapter, in all forward passes after `send`, until `close`.

    On a GPU they compute in the base's number format. On a CPU in float32: narrow products in bfloat16 take several
    times as long there. The model is one of PEFT's with LoRA adapters, or has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[_Layer] = []
        self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Look at the model again, after adapters came or went."""
        self.close()
        one = next(model.parameters())
        self._dtype = torch.float32 if one.device.type == "cpu" else one.dtype
        self._known = set(model.peft_config) if isinstance(model, PeftModel) else set()
        kinds = (LoraLayer, AuxiliaryTrainingWrapper)
        self._layers = [_Layer(module) for module in model.modules() if isinstance(module, kinds)]
        self._names: list[str] = []
        self._stacked: list[str] = []
        for layer in self._layers:
            layer.stack([], self._dtype)

    def send(self, names: Sequence[str]) -> None:
        """Rows of the following batches wear these, BASE_ADAPTER none. Raises ValueError for unknown ones."""
        if names == self._names:
            return
        used = sorted(set(names) - {BASE_ADAPTER})
        if unknown := set(used) - self._known:
            raise ValueError(f"no such adapter: {', '.join(sorted(unknown))}")
        if not set(used) <= set(self._stacked):
            # beside those of the batch before: a batch that reads its prompts and one that is answered take turns
            self._stacked = sorted({*used, *self._names} - {BASE_ADAPTER})
            for layer in self._layers:
                layer.stack(self._stacked, self._dtype)
        self._names = list(names)
        gates: dict[tuple[tuple[str, int], ...], Tensor | None] = {}
        for layer in self._layers:
            if layer.ranks not in gates:
                gates[layer.ranks] = _gate(layer.ranks, self._names, layer.device, self._dtype)
            layer.send(self._names, gates[layer.ranks])

    def wear(self, name: str) -> None:
        """All rows of all batches wear the adapter that the model wears too; what is not plain stays PEFT's."""
        for layer in self._layers:
            layer.wear(name, self._dtype)

    def close(self) -> None:
        """Every layer is PEFT's again."""
        for layer in self._layers:
            layer.close()
        self._layers = []


class _Layer:
    """A layer of PEFT's whose forward pass sends rows through their adapters."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._forward = type(module).forward
        self._names: list[str] = []
        self._is_used = self._is_plain = self._is_left = False
        self._gate: Tensor | None = None
        self.ranks: tuple[tuple[str, int], ...] = ()  # (adapter, columns of the stack) in their order
        self.device = next(module.parameters()).device
        module.forward = self.forward

    def close(self) -> None:
        del self._module.forward

    def stack(self, adapters: Sequence[str], dtype: torch.dtype) -> None:
        """Lay the adapters side by side: `down` (in, ranks), `up` (ranks, out), scaled."""
        module = self._module
        self._is_plain = isinstance(module, LoraLayer) and all(_is_plain(module, name) for name in adapters)
        here = [name for name in adapters if self._is_plain and name in module.lora_A]
        self.ranks = tuple((name, module.r[name]) for name in here)
        if here:
            down = torch.cat([module.lora_A[name].weight.detach() for name in here])
            up = torch.cat([module.lora_B[name].weight.detach() * module.scaling[name] for name in here], dim=1)
            self._down, self._up = down.to(dtype).t().contiguous(), up.to(dtype).t().contiguous()

    def send(self, names: list[str], gate: Tensor | None) -> None:
        self._names, self._gate, self._is_left = names, gate, False
        here = {name for name, _ in self.ranks}
        self._is_used = any(name in here for name in names)

    def wear(self, name: str, dtype: torch.dtype) -> None:
        self.stack([name], dtype)
        self.send([name], None)
        self._is_left = not self._is_plain

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._names or self._is_left:
            return self._forward(self._module, x, *args, **kwargs)
        if not isinstance(self._module, LoraLayer):
            return self._forward(self._module, x, *args, adapter_names=self._names, **kwargs)
        if not self._is_plain:
            return self._one_by_one(x, *args, **kwargs)
        out = self._module.base_layer(x, *args, **kwargs)
        if not self._is_used:
            return out
        narrow = torch.mm(x.reshape(-1, x.shape[-1]).to(self._down.dtype), self._down)
        if self._gate is not None:
            if x.shape[0] != len(self._names):
                raise ValueError("this layer mixes the rows of a batch, so they cannot wear different adapters")
            narrow.view(x.shape[0], -1, narrow.shape[-1]).mul_(self._gate)
        said = torch.mm(narrow, self._up)
        if len(narrow) > FEW_TOKENS:
            said = said.to(out.dtype)
        return out.add_(said.view(out.shape))

    def _one_by_one(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows of each adapter on their own, as PEFT computes them: it cannot mix DoRA."""
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


def _is_plain(module: Any, name: str) -> bool:
    """Whether an adapter is y = xW + s·xAB in this layer, or is not there at all."""
    if name not in module.lora_A:
        return name not in module.lora_embedding_A
    return (
        name not in module.lora_variant
        and isinstance(module.lora_A[name], nn.Linear)
        and module.lora_B[name].bias is None
        and not getattr(module, "fan_in_fan_out", False)
    )


def _gate(
    ranks: Sequence[tuple[str, int]], names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """(rows, 1, columns of the stack): 1 where a column is of the row's adapter, else 0. None when all are 1."""
    columns = [owner for owner, rank in ranks for _ in range(rank)]
    values = [[float(owner == name) for owner in columns] for name in names]
    if all(all(row) for row in values):
        return None
    return torch.tensor(values, device=device, dtype=dtype).unsqueeze(1)
