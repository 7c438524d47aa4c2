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
from studio.engine.gguf.vocabulary import Vocabulary
from studio.engine.job import JobContext
from studio.errors import ModelError

QUANTIZATION_VERSION = 2
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Format:
    """How the matrices of a file are stored; vectors stay float32 in all of them."""

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
    )
}
QUANTIZED = {"q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""What llama.cpp's own tool makes of an f16 file -> about how many bits a weight takes."""
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
YARN_RAMP = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Where YaRN goes from one frequency to the other. For the architectures above llama.cpp reads it from no file."""


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
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn", "dynamic"):
        raise _cannot(f"its positions are scaled by {kind!r}")
    for name, fixed in YARN_RAMP.items() if kind == "yarn" else ():
        if (value := rope.get(name, fixed)) not in (None, fixed):
            raise _cannot(f"its YaRN has {name} {value!r}, where llama.cpp computes with {fixed!r}")
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
    plan = {}
    if _rope(weights.config).get("rope_type") == "llama3":
        plan[ROPE_FACTORS] = (ROPE_FACTORS, torch.Size([_head_dim(weights.config) // 2]), GGMLQuantizationType.F32)
    for name, shape in weights.shapes.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _cannot(f"llama.cpp has no place for its weight {name}")
        plan[target] = (name, shape, _stored_as(shape, form))
    return plan


def _stored_as(shape: torch.Size, form: Format) -> GGMLQuantizationType:
    """Vectors are float32; rows that a block of Q8_0 (32 weights) does not divide are float16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if form.kind == GGMLQuantizationType.Q8_0 and shape[-1] % 32:
        return GGMLQuantizationType.F16
    return form.kind


def _announce(writer: GGUFWriter, name: str, shape: torch.Size, kind: GGMLQuantizationType) -> None:
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        return
    in_bytes = quants.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), raw_dtype=kind)


def values_of(weights: FoldedWeights, name: str) -> Tensor:
    """A weight in float32, its rows in the file's order."""
    if name == ROPE_FACTORS:
        return _rope_factors(weights.config)
    return _as_pairs(weights.config, name, weights.read(name).float())


def before(weights: FoldedWeights, name: str) -> Tensor | None:
    """The base's weight in the same order where an adapter changes it, else None."""
    found = weights.before(name)
    return None if found is None else _as_pairs(weights.config, name, found.float())


def _data(weights: FoldedWeights, name: str, kind: GGMLQuantizationType) -> np.ndarray:
    return quants.quantize(np.ascontiguousarray(values_of(weights, name).numpy()), kind)


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
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    if scaling := SCALINGS.get(rope.get("rope_type", "")):
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(original))
        if scaling is RopeScalingType.YARN:
            writer.add_rope_scaling_attn_factors(_attention_factor(config))


def _speak(writer: GGUFWriter, speech: Speech) -> None:
    speech.vocabulary.write(writer)
    for name, number in speech.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if speech.template:
        writer.add_chat_template(speech.template)


def _rope_factors(config: PretrainedConfig) -> Tensor:
    """By how much Llama 3.1 slows each frequency: not the fast ones, the slow ones by `factor`, smoothly between."""
    rope, width = _rope(config), _head_dim(config)
    base = float(rope["rope_theta"])
    lengths = 2 * math.pi * base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) / lengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _attention_factor(config: PretrainedConfig) -> float:
    """What YaRN stretches queries and keys by, over what llama.cpp stretches them by unasked (the paper's)."""
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return wanted / (1 + 0.1 * math.log(float(_rope(config)["factor"])))


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _cannot(reason: str) -> ModelError:
    return ModelError(
        f"This model cannot be written as GGUF: {reason}.",
        "Merge it instead, and convert the folder with llama.cpp's own convert_hf_to_gguf.py.",
    )
