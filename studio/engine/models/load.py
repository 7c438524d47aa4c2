"""A base model from its folder: weights in the wanted number format, tokenizer, chat template, end-of-text ids."""

import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Everything is read from the folder. Set before transformers is imported; bitsandbytes asks the hub for kernels too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers import logging as transformers_logging  # noqa: E402

from studio.data.named import NamedTemplate, Template, load_template  # noqa: E402
from studio.data.talk import read_talk  # noqa: E402
from studio.data.template import CHAT_TEMPLATE_FILE, ChatTemplate  # noqa: E402
from studio.data.tokens import TextTokenizer  # noqa: E402
from studio.engine.allocator import give_back_memory, given_back_at_once  # noqa: E402
from studio.engine.models.families import OWN_LAYOUT, Native, native, native_pieces  # noqa: E402
from studio.errors import DataError, ModelError  # noqa: E402
from studio.model_code import is_trusted, not_consented  # noqa: E402
from studio.models import missing_parts  # noqa: E402

# Kernels of attention that run on GPUs alone, each with the package that it needs ("": it is torch's own).
GPU_KERNELS = {"varlen": "", "flash_attention_2": "flash_attn", "flex": "triton"}
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass
class LoadedModel:
    """A base model with all that is needed to talk to it; `dtype` is the one it computes in.

    `stops`: texts at which an answer ends, beside the tokens `eos_ids`.
    """

    model: nn.Module
    tokenizer: TextTokenizer
    template: Template
    eos_ids: list[int]
    folder: Path
    device: torch.device
    dtype: torch.dtype
    stops: tuple[str, ...] = ()

    def with_template_of(self, folder: Path) -> "LoadedModel":
        """The same model, spoken to as the weights in `folder` were trained, when their folder says how."""
        talk, has_own = read_talk(folder), (folder / CHAT_TEMPLATE_FILE).is_file()
        if has_own:
            template: Template = ChatTemplate.load(folder)
        elif talk and talk.template:
            template = NamedTemplate.load(talk.template, self.folder)
        else:
            return self
        eos_ids = [*_generation_eos(folder), *_end_of_turn(self.tokenizer, template), *self.eos_ids]
        stops = talk.stops if talk else self.stops
        return replace(self, template=template, eos_ids=list(dict.fromkeys(eos_ids)), stops=stops)

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; what stands there is masked, so any id will do."""
        configured = getattr(self.model.config, "pad_token_id", None)
        return configured if isinstance(configured, int) and configured >= 0 else self.eos_ids[0]


def load_base(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    bits: int = 0,
    device: torch.device,
    template: str = "",
    offload_folder: Path | None = None,
) -> LoadedModel:
    """Load a causal language model from a local folder; `bits` 4 (NF4) or 8 squeezes its linear layers, 0 does not.

    `template` names the chat template, "" takes the tokenizer's own. With `offload_folder` layers that the GPU has no
    room for stay in memory, and those that memory has no room for go to files there.

    No code of the folder runs. Raises ModelError or DataError with what is wrong and what to do.
    """
    folder = Path(folder)
    if missing := missing_parts(folder):
        raise ModelError(
            f"The folder {str(folder)!r} is not a complete model: {', '.join(missing)}.",
            "Give a folder in Hugging Face format, or fetch the model again.",
        )
    tokenizer, chat_template = TextTokenizer.load(folder), load_template(template, folder)
    with given_back_at_once() if bits and device.type == "cpu" else nullcontext():
        model = _load_weights(folder, dtype, pick_attention(attention, device), bits, device, offload_folder)
        if bits == 8:
            from studio.engine.int8 import round_weights_alone  # bitsandbytes takes a second to import

            round_weights_alone(model)
        if bits and device.type == "cpu":
            _let_go_of_files(model)
    _require_fitting_vocabulary(model, tokenizer, folder)
    eos_ids = _eos_ids(folder, tokenizer, chat_template)
    return LoadedModel(model, tokenizer, chat_template, eos_ids, folder, device, dtype, _stops(folder, chat_template))


def has_needed(kernel: str) -> bool:
    """Whether the package of a kernel of GPU_KERNELS is installed; torch's own needs none."""
    return not GPU_KERNELS[kernel] or find_spec(GPU_KERNELS[kernel]) is not None


def pick_attention(name: str, device: torch.device) -> str:
    """What transformers loads a model with, by a config's name; training chooses its own kernel later.

    Raises ModelError for a kernel that cannot run here.
    """
    needed = GPU_KERNELS.get(name, "")
    if name in GPU_KERNELS and (device.type != "cuda" or not has_needed(name)):
        raise ModelError(
            f"model.attention {name} cannot run on {device.type} here" + (f", it needs {needed}." if needed else "."),
            "Set model.attention to auto, or train on a machine with an NVIDIA GPU"
            + (f" and {needed.replace('_', '-')} installed." if needed else "."),
        )
    return "eager" if name == "eager" else "sdpa"


def _load_weights(
    folder: Path, dtype: torch.dtype, attention: str, bits: int, device: torch.device, offload_folder: Path | None
) -> nn.Module:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{str(folder)!r} holds an adapter beside a model.", "Move adapter_config.json out, or merge the two first."
        )
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "local_files_only": True,
        "trust_remote_code": is_trusted(folder),
        "use_safetensors": any(folder.glob("*.safetensors")),
    }
    if bits:
        arguments |= {"quantization_config": _quantization(bits, dtype), "device_map": {"": device}}
    if offload_folder:
        arguments |= {"device_map": "auto", "offload_folder": str(offload_folder)}
    transformers_logging.disable_progress_bar()
    # What libraries will do in future versions is nothing that a person training a model can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    try:
        if found := native(folder):
            model = _of_family(folder, found, arguments)
        else:
            arguments["attn_implementation"] = _supported(folder, attention)
            model = AutoModelForCausalLM.from_pretrained(str(folder), **arguments)
        return model if "device_map" in arguments else model.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign folder makes transformers raise, the person needs its cause
        raise _model_error(folder, error) from error


def _let_go_of_files(model: nn.Module) -> None:
    """Weights that were not squeezed still lie in the mapped files, and those keep the squeezed ones in memory, too."""
    for each in (*model.parameters(), *model.buffers()):
        if each.is_floating_point():
            each.data = each.data.clone()
    give_back_memory()


def _supported(folder: Path, attention: str) -> str:
    """`attention`, or eager for an architecture that has no sdpa, such as Gemma 2 with its capped scores."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=is_trusted(folder))
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if attention == "sdpa" and not getattr(kind, "_supports_sdpa", True) else attention


def _of_family(folder: Path, found: Native, arguments: dict[str, Any]) -> nn.Module:
    """A family that is Llama underneath, in transformers' own class; its Python files are not looked at."""
    ours = {name: value for name, value in arguments.items() if name not in ("local_files_only", "use_safetensors")}
    ours |= {"config": found.config, "state_dict": native_pieces(folder, found, arguments["dtype"])}
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(found.config)]
    model, report = kind.from_pretrained(None, output_loading_info=True, **ours)
    if odd := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{sorted(map(str, odd))[0]} does not fit {found.family.name}")
    setattr(model, OWN_LAYOUT, found)
    return model


def _quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits not in (4, 8):
        raise ModelError(f"A base model cannot be squeezed to {bits} bits.", "Allowed: 4 and 8.")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _model_error(folder: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:400]
    if "trust_remote_code" in str(error) or ("model type" in reason and any(folder.glob("*.py"))):
        return not_consented(folder)
    return ModelError(
        f"The model in {str(folder)!r} cannot be loaded: {type(error).__name__}: {reason}",
        "Check that the files are complete (fetch it again) and that transformers knows this architecture.",
    )


def _require_fitting_vocabulary(model: nn.Module, tokenizer: TextTokenizer, folder: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"The tokenizer of {folder.name!r} has {tokenizer.vocab_size} ids, its embedding {rows} rows.",
            "Tokenizer and weights do not belong together; fetch the model again.",
        )


def _eos_ids(folder: Path, tokenizer: TextTokenizer, template: Template) -> list[int]:
    """Ids that end an answer: those that the model names, the one that the template ends a turn with, its stops."""
    found = _generation_eos(folder)
    named = tokenizer.token_id(template.special_tokens.get("eos_token", ""))
    found += [named] if named is not None else []
    found += _end_of_turn(tokenizer, template)
    stops = template.stop if isinstance(template, NamedTemplate) else ()
    found += [stop for stop in map(tokenizer.token_id, stops) if stop is not None]
    if not found:
        raise ModelError(
            f"The model {folder.name!r} names no end-of-text token.", "Add eos_token_id to its generation_config.json."
        )
    return list(dict.fromkeys(found))


def _stops(folder: Path, template: Template) -> tuple[str, ...]:
    """Texts that end an answer; weights that we made say it when they are spoken to in their own template."""
    if isinstance(template, NamedTemplate):
        return template.stop
    talk = read_talk(folder)
    return talk.stops if talk else ()


def _generation_eos(folder: Path) -> list[int]:
    if not (folder / "generation_config.json").is_file():
        return []
    try:
        eos = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"generation_config.json of {folder.name!r} cannot be read: {error}.") from error
    return [eos] if isinstance(eos, int) else list(eos or [])


def _end_of_turn(tokenizer: TextTokenizer, template: Template) -> list[int]:
    """The control token after an answer, when the template writes one."""
    try:
        trained = [segment for segment in template.segments(PROBE) if segment.trained]
    except DataError:  # a template that wants other turns than these; the ids that the model names remain
        return []
    last = tokenizer.encode(trained[-1].text.rstrip())[-1:] if trained else []
    return [token for token in last if tokenizer.decode([token]) in tokenizer.control_tokens]
