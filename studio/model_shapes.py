"""The weights of a model, by name and size, from its config.json alone: as transformers would make them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A matrix of one layer that an adapter can stand beside: (num_out, num_in)."""

    name: str
    num_out: int
    num_in: int

    @property
    def num_weights(self) -> int:
        return self.num_out * self.num_in


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes. `linears` are those of one layer; `num_other` are the norms and biases of the whole model.

    `is_known` is False for an architecture that is counted as if it were a Llama.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    linears: tuple[Linear, ...]
    num_other: int
    is_known: bool = True

    @property
    def num_linear(self) -> int:
        """Weights in the layers' matrices."""
        return self.num_layers * sum(linear.num_weights for linear in self.linears)

    @property
    def num_embedding(self) -> int:
        """Weights of the embedding, and of the output head where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_weights(self) -> int:
        """All weights, tied ones once."""
        return self.num_linear + self.num_embedding + self.num_other

    @property
    def largest_linear(self) -> int:
        return max(linear.num_weights for linear in self.linears)

    def targets(self, names: str) -> tuple[Linear, ...]:
        """The matrices of a layer that `lora.target_modules` chooses: all-linear, or names with commas."""
        if names == "all-linear":
            return self.linears
        wanted = [name.rpartition(".")[2] for name in names.split(",")]
        return tuple(linear for linear in self.linears if linear.name in wanted)


@dataclass(frozen=True)
class Family:
    """In what an architecture differs from others. `biases`: the settings that give its matrices biases;
    `qk_norm`: norms of queries and keys, per head or over all."""

    biases: tuple[str, ...] = ()
    is_fused: bool = False
    qkv_bias: bool = False
    norms: int = 2
    qk_norm: str = ""
    head_dim: int = 0
    tied: bool = False


ATTENTION, BOTH = ("attention_bias",), ("attention_bias", "mlp_bias")
FAMILIES = {
    "llama": Family(BOTH),
    "mistral": Family(),
    "granite": Family(BOTH),
    "smollm3": Family(BOTH, tied=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(ATTENTION, qk_norm="head", head_dim=128),
    "olmo2": Family(ATTENTION, qk_norm="all"),
    "gemma": Family(ATTENTION, head_dim=256, tied=True),
    "gemma2": Family(ATTENTION, norms=4, head_dim=256, tied=True),
    "gemma3_text": Family(ATTENTION, norms=4, qk_norm="head", head_dim=256, tied=True),
    "phi3": Family(is_fused=True),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def read_shapes(folder: Path) -> Shapes:
    """The sizes of the model in a folder. Raises ModelError when its config.json is missing or lacks them."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The sizes of the model in {str(folder)!r} cannot be read: {error}.", "Fetch the model first."
        ) from error
    return shapes_of(values if isinstance(values, dict) else {})


def shapes_of(config: dict[str, Any]) -> Shapes:
    """The sizes that a config.json describes; a multimodal one by its text part. Raises ModelError."""
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config = {**config, **nested}
    if missing := [name for name in SIZES if not isinstance(config.get(name), int) or config[name] < 1]:
        raise ModelError(
            f"config.json of a {config.get('model_type', 'nameless')} model has no {', '.join(missing)}.",
            f"Its memory cannot be estimated from it; known architectures: {', '.join(FAMILIES)}.",
        )
    config = _translated(config)
    family = FAMILIES.get(config.get("model_type", ""))
    return _shapes(config, family or FAMILIES["llama"], family is not None)


def _translated(config: dict[str, Any]) -> dict[str, Any]:
    """A config of a family that came with code of its own, in the words of the one that computes it here (see
    studio.engine.models.families)."""
    kind = config.get("model_type")
    if kind == "qwen":  # it counts both of the matrices that widen
        return {**config, "model_type": "qwen2", "intermediate_size": config["intermediate_size"] // 2}
    if kind in ("internlm", "internlm2"):
        return {**config, "model_type": "llama", "attention_bias": bool(config.get("bias"))}
    return {**config, "model_type": "llama"} if kind in ("Yi", "baichuan") else config


def _shapes(config: dict[str, Any], family: Family, is_known: bool) -> Shapes:
    hidden, num_layers, heads, intermediate, vocabulary = (config[name] for name in SIZES)
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or family.head_dim or hidden // heads
    linears = _linears(hidden, heads * head_dim, kv_heads * head_dim, intermediate, family.is_fused)
    norm_widths = {"": 0, "head": 2 * head_dim, "all": (heads + kv_heads) * head_dim}[family.qk_norm]
    per_layer = family.norms * hidden + norm_widths + _biases(config, family, linears)
    tied = config.get("tie_word_embeddings")
    return Shapes(
        hidden, num_layers, heads, kv_heads, head_dim, intermediate, vocabulary,
        is_tied=family.tied if tied is None else bool(tied),
        linears=linears, num_other=num_layers * per_layer + hidden, is_known=is_known,
    )  # fmt: skip


def _linears(hidden: int, queries: int, keys: int, intermediate: int, is_fused: bool) -> tuple[Linear, ...]:
    if is_fused:
        first = (Linear("qkv_proj", queries + 2 * keys, hidden), Linear("gate_up_proj", 2 * intermediate, hidden))
    else:
        first = (
            Linear("q_proj", queries, hidden), Linear("k_proj", keys, hidden), Linear("v_proj", keys, hidden),
            Linear("gate_proj", intermediate, hidden), Linear("up_proj", intermediate, hidden),
        )  # fmt: skip
    return (*first, Linear("o_proj", hidden, queries), Linear("down_proj", hidden, intermediate))


def _biases(config: dict[str, Any], family: Family, linears: tuple[Linear, ...]) -> int:
    """Biases of one layer."""
    biased = {"q_proj", "k_proj", "v_proj"} if family.qkv_bias else set()
    if config.get("attention_bias") and "attention_bias" in family.biases:
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if config.get("mlp_bias") and "mlp_bias" in family.biases:
        biased |= {"gate_proj", "up_proj", "down_proj"}
    return sum(linear.num_out for linear in linears if linear.name in biased)
