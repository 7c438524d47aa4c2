"""`export`: what leaves for another tool answers as what was trained, or is marked as a failure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from studio.engine import convert, export
from studio.store import checkpoints as store
from studio.store import open_db
from tests.data.tokenizers_for_tests import write_model_folder
from tests.engine.folders import lora_checkpoint
from tests.engine.test_convert import Job

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_llama(folder: Path, family: str = "byte_level", **changes: Any) -> Path:
    """A two-layer Llama with a trained tokenizer, such as a GGUF file can hold."""
    write_model_folder(folder, family, CHATML)
    torch.manual_seed(0)
    values = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(LlamaConfig(**values | changes)).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    pth = lora_checkpoint(base, tmp_path / "runs" / "tiny-1" / "step_8.pth")
    convert.run(Job(tmp_path, pth=str(pth), out=str(tmp_path / "adapter")))
    return tmp_path / "adapter"


def export_it(tmp_path: Path, weights: Path, **args: Any) -> dict[str, Any]:
    args = {"kind": "gguf", "weights": str(weights), "out": str(tmp_path / "out"), "format": "f16"} | args
    return export.run(Job(tmp_path, **args))


def test_a_gguf_file_answers_as_base_and_adapter(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "project.json").write_text("{}")
    result = export_it(tmp_path, adapter)
    assert result["passed"], result["message"]
    assert result["figures"]["relative_error"] < 0.01
    gate = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert gate["passed"] and gate["files"] == ["README.md", "gate.json", "out-f16.gguf"]
    with open_db(tmp_path) as db:
        (output,) = store.outputs(db, "export")
    assert (output.path, output.step, output.detail["passed"]) == ("out", 8, True)
