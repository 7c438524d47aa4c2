"""Small models and checkpoints in the layouts that the product reads and writes."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from studio.config.schema import RunConfig, parse_config
from studio.models import model_fingerprint
from studio.paths import sha256_of

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_base(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = True, hidden_size: int = 32
) -> Path:
    """A complete two-layer Llama with a byte tokenizer and a chat template."""
    folder.mkdir(parents=True)
    tokenizer = _byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    special = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def as_torch_file(base: Path) -> Path:
    """The same base with its weights in pytorch_model.bin, as older models have them."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def config_for(base: Path, method: str = "lora", **train: Any) -> RunConfig:
    values = {"name": "tiny", "method": method, "model": {"base": str(base)}, "lora": {"rank": 4, "alpha": 16}}
    return parse_config(values | {"train": {"num_steps": 8, "num_epochs": None, "warmup_steps": 1} | train})


def lora_model(base: Path, seed: int = 1) -> torch.nn.Module:
    """The base in float32 with an adapter that has learnt something: its B matrices are not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    adapter = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapter.eval()


def lora_checkpoint(base: Path, path: Path, step: int = 8, seed: int = 1, manifest: bool = True) -> Path:
    """A checkpoint of a LoRA run, as the trainer writes it."""
    model = lora_model(base, seed)
    values = model.peft_config["default"].to_dict()
    adapter_config = json.loads(json.dumps(values, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
    state = dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return write_checkpoint(path, base, "lora", state, adapter_config, step, manifest)


def full_checkpoint(base: Path, path: Path, step: int = 8) -> Path:
    """A checkpoint of a full run: every weight in float32 and off the base by a little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return write_checkpoint(path, base, "full", dict(model.state_dict()), None, step, True)


def write_checkpoint(
    path: Path,
    base: Path,
    method: str,
    state: dict[str, torch.Tensor],
    adapter_config: dict[str, Any] | None,
    step: int = 8,
    manifest: bool = True,
) -> Path:
    meta = {
        "format": "retune/1",
        "step": step,
        "method": method,
        "base": str(base),
        "base_fingerprint": model_fingerprint(base),
        "config": config_for(base, method).model_dump(mode="json"),
        "adapter_config": adapter_config,
        "versions": {"torch": str(torch.__version__)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"fingerprints": {"identity": "ab" * 32}}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {}, "data": data, "rng": {}}, path)
    if manifest:
        record = {"file": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_of(path), "step": step}
        path.with_suffix(".manifest.json").write_text(json.dumps(record), encoding="utf-8")
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
