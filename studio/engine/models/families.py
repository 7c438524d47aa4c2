"""Model families that are Llama underneath and came with Python code of their own: read as transformers' own classes.

InternLM2 and 2.5, InternLM, Baichuan and Baichuan2 7B, Qwen (1), Yi as it was first published. Their code is not run:
the config is translated, the weights are renamed, and where query, key and value lie in one matrix it is cut.
`own_state` is the way back. Sources: the configs and papers that the families were published with. Names and values are
exact both ways, but for Baichuan2's output head, which its model normalises at each use, and which is stored normalised
here: the logits are the same.

Not among them: families that are built otherwise (ChatGLM, the 13B Baichuans with ALiBi, MiniCPM).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from studio.engine.split import read_shard
from studio.errors import CheckpointError, ModelError
from studio.weight_folders import weight_files

OWN_LAYOUT = "own_layout"
"""Attribute of a loaded model of such a family: its `Native`, for adapters that come in its own layout."""
LAYERS = "model.layers."
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """How a family names its weights. `inner` are modules of a layer, `outer` the weights around the layers.

    `fused` is the module that holds query, key and value, `is_grouped` whether they alternate by key-value head
    (InternLM2), or follow each other. `normalises_head` as Baichuan2 does.
    """

    name: str
    layers: str = LAYERS
    inner: Mapping[str, str] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=dict)
    fused: str = ""
    is_grouped: bool = False
    normalises_head: bool = False


INTERNLM2 = Family(
    "InternLM2",
    inner={
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    outer={"model.tok_embeddings.weight": "model.embed_tokens.weight", "output.weight": HEAD},
    fused="attention.wqkv",
    is_grouped=True,
)  # fmt: skip
INTERNLM = Family("InternLM")
YI = Family("Yi", inner={"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})
BAICHUAN = Family("Baichuan", fused="self_attn.W_pack")
BAICHUAN2 = Family("Baichuan2", fused="self_attn.W_pack", normalises_head=True)
QWEN = Family(
    "Qwen",
    layers="transformer.h.",
    inner={
        "attn.c_proj": "self_attn.o_proj", "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    },
    outer={"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"},
    fused="attn.c_attn",
)  # fmt: skip


@dataclass(frozen=True)
class Native:
    """A folder of such a family: its own config's values, and the config of the class that computes it here."""

    family: Family
    values: dict[str, Any]
    config: PretrainedConfig

    def state(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Weights under transformers' names. Raises CheckpointError for a shape that cannot be cut."""
        return {ours: each for name, tensor in tensors for ours, each in self._to_ours(name, tensor)}

    def translated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights or an adapter under transformers' names, whichever layout they came in."""
        own = any(self._is_own(name) for name in tensors)
        return self.state(tensors.items()) if own else dict(tensors)

    def _is_own(self, name: str) -> bool:
        module = _split(name, self.family.layers)[1]
        return name in self.family.outer or module in self.family.inner or module == self.family.fused != ""

    def own_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: weights under the family's own names. An adapter on query, key and value has no way back."""
        found, parts = {}, {}
        for name, tensor in tensors.items():
            layer, module, suffix = _split(name, LAYERS)
            if self.family.fused and module in PARTS:
                parts.setdefault((layer, suffix), {})[module] = tensor
            else:
                found[self._own_name(name, layer, module, suffix)] = tensor
        for (layer, suffix), three in parts.items():
            if len(three) != len(PARTS) or "lora_" in suffix:
                raise CheckpointError(
                    f"An adapter on {', '.join(three)} cannot be written in {self.family.name}'s own layout.",
                    "Merge it into its base first.",
                )
            name = f"{self.family.layers}{layer}.{self.family.fused}.{suffix}"
            found[name] = self._fuse([three[part] for part in PARTS])
        return found

    def renamed_targets(self, names: Iterable[str]) -> list[str]:
        """The modules of an adapter (last parts of their names) as they are called here."""
        renames = {theirs.rpartition(".")[2]: {ours.rpartition(".")[2]} for theirs, ours in self.family.inner.items()}
        if self.family.fused:
            renames[self.family.fused.rpartition(".")[2]] = {part.rpartition(".")[2] for part in PARTS}
        if "c_proj" in renames:  # Qwen calls two modules so
            renames["c_proj"] = {"o_proj", "down_proj"}
        return sorted(set().union(*(renames.get(name, {name}) for name in names)))

    def _to_ours(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        family = self.family
        layer, module, suffix = _split(name, family.layers)
        prefix = name[: name.index(family.layers)] if layer else ""
        if family.fused and module == family.fused:
            pieces = [tensor] * 3 if ".lora_A." in f".{suffix}" else self._cut(name, tensor)
            for part, piece in zip(PARTS, pieces, strict=True):
                yield f"{prefix}{LAYERS}{layer}.{part}.{suffix}", piece
        elif layer:
            yield f"{prefix}{LAYERS}{layer}.{family.inner.get(module, module)}.{suffix}", tensor
        else:
            ours = family.outer.get(name, name)
            yield ours, _normalised(tensor) if family.normalises_head and ours == HEAD else tensor

    def _own_name(self, name: str, layer: str, module: str, suffix: str) -> str:
        family = self.family
        if not layer:
            return next((theirs for theirs, ours in family.outer.items() if ours == name), name)
        own = next((theirs for theirs, ours in family.inner.items() if ours == module), module)
        return f"{name[: name.index(LAYERS)]}{family.layers}{layer}.{own}.{suffix}"

    @property
    def _heads(self) -> tuple[int, int, int]:
        """(query heads, key-value heads, rows of one head)."""
        config = self.config
        return (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )

    def _cut(self, name: str, tensor: Tensor) -> list[Tensor]:
        queries, groups, width = self._heads
        if tensor.shape[0] != (queries + 2 * groups) * width:
            raise CheckpointError(
                f"{name} has {tensor.shape[0]} rows, and {queries} query and {groups} key-value heads of {width} need "
                f"{(queries + 2 * groups) * width}.",
                "Config and weights do not belong together.",
            )
        if not self.family.is_grouped:
            return list(tensor.split([queries * width, groups * width, groups * width]))
        grouped = tensor.reshape(groups, queries // groups + 2, width, *tensor.shape[1:])
        return [each.reshape(-1, *tensor.shape[1:]) for each in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]

    def _fuse(self, parts: list[Tensor]) -> Tensor:
        if not self.family.is_grouped:
            return torch.cat(parts)
        queries, groups, width = self._heads
        counts = (queries // groups, 1, 1)
        shaped = [
            part.reshape(groups, count, width, *part.shape[1:]) for part, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(shaped, dim=1).reshape(-1, *parts[0].shape[1:])


def native(folder: Path) -> Native | None:
    """How a folder's model is computed without its code; None when transformers knows its architecture, or nobody does.

    Raises ModelError when its config cannot be read.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json of {folder.name!r} cannot be read: {error}.", "Fetch the model again."
        ) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    try:
        if kind == "internlm2":
            return Native(INTERNLM2, values, _llama(values, attention_bias=bool(values.get("bias"))))
        if kind == "internlm":
            return Native(INTERNLM, values, _llama(values, attention_bias=bool(values.get("bias"))))
        if kind == "Yi":  # later revisions say llama
            return Native(YI, values, _llama(values))
        if kind == "baichuan" and _has_rotary_positions(values):
            is_second = "z_loss_weight" in values or values.get("vocab_size") == 125696
            return Native(BAICHUAN2 if is_second else BAICHUAN, values, _llama(values))
        if kind == "qwen":
            return Native(QWEN, values, _qwen2(values))
    except KeyError as error:
        raise ModelError(f"config.json of {folder.name!r} does not say {error}.", "Fetch the model again.") from error
    return None


def read_native(folder: Path, found: Native, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a folder under transformers' names, in `dtype`."""
    return found.state((name, tensor.to(dtype)) for name, tensor in _stored(folder))


class Piece:
    """A weight of a folder under transformers' name: cut out and converted each time that it is asked for.

    transformers asks with `[...]`, as it asks the slices of safetensors, one weight after the other: a base that is
    squeezed into 4 bits as it comes never stands in memory whole.
    """

    def __init__(self, found: Native, name: str, tensor: Tensor, place: int, dtype: torch.dtype) -> None:
        self._found, self._name, self._tensor = found, name, tensor
        self._place, self._dtype = place, dtype

    def __getitem__(self, where: Any) -> Tensor:
        _, tensor = list(self._found._to_ours(self._name, self._tensor))[self._place]
        return tensor.to(self._dtype)[where]


def native_pieces(folder: Path, found: Native, dtype: torch.dtype) -> dict[str, Piece]:
    """As `read_native`, but nothing is read yet. Raises CheckpointError for a shape that cannot be cut."""
    return {
        ours: Piece(found, name, tensor, place, dtype)
        for name, tensor in _stored(folder)
        for place, (ours, _) in enumerate(found._to_ours(name, tensor.to("meta")))
    }


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names of the files, whose pages are read when a weight is used."""
    shards, _ = weight_files(folder)
    return ((name, tensor) for shard in shards for name, tensor in read_shard(shard) if not is_derived(name))


def is_derived(name: str) -> bool:
    """Tables that older versions stored, and that are worked out here."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias"))


def _llama(values: dict[str, Any], attention_bias: bool = False) -> LlamaConfig:
    heads = values["num_attention_heads"]
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        max_position_embeddings=values.get("max_position_embeddings") or 2048,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        hidden_act=values.get("hidden_act", "silu"),
        attention_bias=attention_bias,
        rope_parameters=_rope(values, float(values.get("rope_theta") or 10000.0)),
        **_shared(values),
    )


def _qwen2(values: dict[str, Any]) -> Qwen2Config:
    if not values.get("no_bias", True):
        raise ModelError("This Qwen has biases in every layer, which no published one has.", "Use another model.")
    return Qwen2Config(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"] // 2,
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_attention_heads"],
        max_position_embeddings=values.get("seq_length") or values.get("max_position_embeddings") or 2048,
        rms_norm_eps=values.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(values.get("rotary_emb_base") or 10000.0)},
        **_shared(values),
    )


def _rope(values: dict[str, Any], theta: float) -> dict[str, Any]:
    """Positions as the config has them; InternLM2's dynamic scaling begins beyond max_position_embeddings."""
    scaling = values.get("rope_scaling") or values.get("rotary") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("base") or theta)
    if kind in ("default", "origin"):
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": kind, "rope_theta": theta, "factor": float(scaling.get("factor") or 1.0)}


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    dtype = values.get("torch_dtype") or values.get("dtype")
    ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "initializer_range": values.get("initializer_range", 0.02),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        **ids,
    } | ({"dtype": str(dtype)} if dtype else {})


def _has_rotary_positions(values: dict[str, Any]) -> bool:
    """The 7B models have; those of 13B use ALiBi, and say no max_position_embeddings."""
    return "max_position_embeddings" in values


def _split(name: str, layers: str) -> tuple[str, str, str]:
    """(number of the layer, module, what of it) of a name; three empty texts outside the layers."""
    match = re.search(rf"{re.escape(layers)}(\d+)\.(.+?)\.((?:lora_[A-Za-z_]+\.)?(?:default\.)?(?:weight|bias))$", name)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def _normalised(head: Tensor) -> Tensor:
    return torch.nn.functional.normalize(head.float()).to(head.dtype)


def layout_of(model: torch.nn.Module) -> Native | None:
    """The `Native` of a model that was loaded from a family's own layout; None for all others."""
    found = getattr(model, OWN_LAYOUT, None)
    return found if isinstance(found, Native) else None
