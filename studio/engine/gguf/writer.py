"""Writes a model as one GGUF file, tensor by tensor.

Layout of the architectures from llama.cpp (src/llama-arch.cpp, conversion scripts); the `gguf` package writes the bytes
and quantises. Llama's query and key rows go from transformers' halves (first all cosine partners, then all sine
partners of a head) to neighbouring pairs, which is how llama.cpp turns them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from studio.engine.folding import FoldedWeights
from studio.engine.gguf import k_quants
from studio.engine.gguf.vocabulary import Vocabulary
from studio.engine.job import JobContext
from studio.errors import ModelError

QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Format:
    """How the matrices of a file are stored (of k-quants: most of them); vectors stay float32 in all of them."""

    name: str
    kind: GGMLQuantizationType
    file_type: LlamaFileType
    bits_per_weight: float


FORMATS = {
    each.name: each
    for each in (
        Format("f32", GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 32),
        Format("f16", GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 16),
        Format("bf16", GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 16),
        Format("q8_0", GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 8.5),
        Format("q6_k", GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K, 6.6),
        Format("q5_k_m", GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, 5.7),
        Format("q4_k_m", GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, 4.9),
    )
}
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN, "longrope": RopeScalingType.LONGROPE}
KINDS_OF_POSITIONS = ("default", "dynamic", "llama3", *SCALINGS)
"""`dynamic` stretches nothing within the context that a file is good for."""
YARN_RAMP = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Where YaRN goes from one frequency to the other. For the architectures above llama.cpp reads it from no file; another
ramp is written as factors of the frequencies."""
CPU = torch.device("cpu")
FACTORS, LONG_FACTORS, SHORT_FACTORS = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))


@dataclass(frozen=True)
class Speech:
    """What a file says about talking to it: tokenizer, chat template (Jinja) and special tokens by name."""

    vocabulary: Vocabulary
    template: str
    ids: Mapping[str, int]


def require_writable(config: PretrainedConfig) -> MODEL_ARCH:
    """llama.cpp's architecture for a model. Raises ModelError for one that cannot be written here."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise _cannot(f"its architecture {config.model_type!r} is not among {', '.join(ARCHITECTURES)}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise _cannot(f"it computes with {config.hidden_act!r}, and llama.cpp's {found.name} with 'silu'")
    kind = _rope(config).get("rope_type", "default")
    if kind not in KINDS_OF_POSITIONS:
        raise _cannot(f"its positions are scaled by {kind!r}")
    if _rope_factors(config) and found is not MODEL_ARCH.LLAMA:
        raise _cannot(f"its frequencies have factors ({kind}), and llama.cpp's {found.name} knows none")
    return found


def context_length(config: PretrainedConfig) -> int:
    """Tokens that a file is good for: no more than a sliding window, which llama.cpp's architectures above lack."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def write(
    job: JobContext, path: Path, weights: FoldedWeights, speech: Speech, form: Format, about: Mapping[str, str]
) -> None:
    """Write the file. `about`: general.* entries, such as name and license."""
    config = weights.config
    architecture = require_writable(config)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    try:
        _describe(writer, config, form, about)
        _speak(writer, speech)
        plan = plan_of(weights, form)
        for target, (_, shape, kind) in plan.items():
            _announce(writer, target, shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        job.phase("writing the GGUF file", total=len(plan), unit="tensors")
        for number, (_, (name, _, kind)) in enumerate(plan.items(), 1):
            writer.write_tensor_data(_data(weights, name, kind))
            job.progress(number)
    finally:
        writer.close()


def plan_of(weights: FoldedWeights, form: Format) -> dict[str, tuple[str, torch.Size, GGMLQuantizationType]]:
    """Name in the file -> (name of the weight, its shape, how it is stored)."""
    names = get_tensor_name_map(require_writable(weights.config), weights.config.num_hidden_layers)
    factors = _rope_factors(weights.config)
    plan = {name: (name, each.shape, GGMLQuantizationType.F32) for name, each in factors.items()}
    for name, shape in weights.shapes.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _cannot(f"llama.cpp has no place for its weight {name}")
        plan[target] = (name, shape, _stored_as(target, shape, form, weights.config))
    return plan


def _stored_as(name: str, shape: torch.Size, form: Format, config: PretrainedConfig) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = k_quants.kind_of(name, form.kind, config.num_hidden_layers, config.tie_word_embeddings)
    return k_quants.fitting(kind, shape[-1])


def _announce(writer: GGUFWriter, name: str, shape: torch.Size, kind: GGMLQuantizationType) -> None:
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        return
    in_bytes = quants.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), raw_dtype=kind)


def values_of(weights: FoldedWeights, name: str) -> Tensor:
    """A weight in float32, its rows in the file's order."""
    factors = _rope_factors(weights.config)
    return factors[name] if name in factors else _as_pairs(weights.config, name, weights.read(name).float())


def before(weights: FoldedWeights, name: str) -> Tensor | None:
    """The base's weight in the same order where an adapter changes it, else None."""
    found = weights.before(name)
    return None if found is None else _as_pairs(weights.config, name, found.float())


def _data(weights: FoldedWeights, name: str, kind: GGMLQuantizationType) -> np.ndarray:
    values = np.ascontiguousarray(values_of(weights, name).numpy())
    if kind in k_quants.K_QUANTS:
        return k_quants.quantize(values, kind, torch.get_num_threads())
    return quants.quantize(values, kind)


def _as_pairs(config: PretrainedConfig, name: str, tensor: Tensor) -> Tensor:
    """Query and key rows of the Llama architecture, each head's two halves interleaved."""
    if ARCHITECTURES[config.model_type] is not MODEL_ARCH.LLAMA:
        return tensor
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f".{part}." in name:
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _describe(writer: GGUFWriter, config: PretrainedConfig, form: Format, about: Mapping[str, str]) -> None:
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    writer.add_file_type(form.file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_theta(config))
    _scale_positions(writer, config)


def _scale_positions(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """How positions beyond those of pretraining are reached. `_rope_factors` has what a tensor of the file says of it.

    llama.cpp stretches queries and keys by YaRN's own factor unasked, and by `attn_factor` on top of that.
    """
    rope = _rope(config)
    scaling = SCALINGS.get(rope.get("rope_type", ""))
    if scaling is RopeScalingType.YARN and FACTORS in _rope_factors(config):
        return writer.add_rope_scaling_attn_factors(_attention_factor(config))
    if scaling is None:
        return None
    writer.add_rope_scaling_type(scaling)
    if original := rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(int(original))
    if scaling is RopeScalingType.LONGROPE:
        return writer.add_rope_scaling_attn_factors(_attention_factor(config))
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    writer.add_rope_scaling_factor(factor)
    if scaling is RopeScalingType.YARN:
        writer.add_rope_scaling_attn_factors(_attention_factor(config) / (1 + 0.1 * math.log(factor)))
    return None


def _speak(writer: GGUFWriter, speech: Speech) -> None:
    speech.vocabulary.write(writer)
    for name, number in speech.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if speech.template:
        writer.add_chat_template(speech.template)


def _rope_factors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensors of a file by which each frequency is divided, (head dimension / 2,); none where a scale says it all.

    Llama 3.1 slows the slow ones; LongRoPE has one tensor within the context of pretraining and one beyond it.
    """
    rope = _rope(config)
    kind = rope.get("rope_type")
    if kind == "longrope":
        names = {LONG_FACTORS: "long_factor", SHORT_FACTORS: "short_factor"}
        return {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in names.items()}
    has_own_ramp = kind == "yarn" and any(rope.get(name) not in (None, fixed) for name, fixed in YARN_RAMP.items())
    if kind != "llama3" and not has_own_ramp:
        return {}
    width = _head_dim(config)
    plain = _theta(config) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, CPU)
    return {FACTORS: plain / scaled}


def _attention_factor(config: PretrainedConfig) -> float:
    """What queries and keys are stretched by."""
    _, factor = ROPE_INIT_FUNCTIONS[_rope(config)["rope_type"]](config, CPU)
    return float(factor)


def _theta(config: PretrainedConfig) -> float:
    return float(_rope(config).get("rope_theta") or 10000.0)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _cannot(reason: str) -> ModelError:
    return ModelError(
        f"This model cannot be written as GGUF: {reason}.",
        "Merge it instead, and convert the folder with llama.cpp's own convert_hf_to_gguf.py.",
    )
