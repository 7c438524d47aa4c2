"""What an XTuner checkpoint says of itself, and what its config's text says, read without running it."""

from pathlib import Path

import pytest
import torch

from studio.config.xtuner.reading import MAX_BYTES
from studio.errors import CheckpointError
from studio.foreign.settings import Settings, read_settings
from studio.foreign.xtuner import checkpoints_in, open_checkpoint
from tests.foreign.canary import quiet
from tests.foreign.places import FULL, LORA, XTUNER_CONFIG, ZERO2, copied


@pytest.mark.parametrize(
    ("path", "layout", "method", "parameters"),
    [(LORA, "file", "lora", 16384), (ZERO2, "DeepSpeed, ZeRO 2", "lora", 16384), (FULL, "file", "full", 336192)],
    ids=["lora", "zero2", "full"],
)
def test_facts_at_a_glance(path: Path, layout: str, method: str, parameters: int) -> None:
    facts = open_checkpoint(path).facts()
    assert (facts["layout"], facts["method"], facts["parameters"]) == (layout, method, parameters)
    assert (facts["iteration"], facts["step"], facts["base"]) == (96, 6, "/ft/base/tiny-llama")
    assert (facts["template"], facts["written by"], facts["seed"]) == ("internlm2_chat", "mmengine 0.10.7", 42)


def test_names_are_those_of_peft_and_transformers() -> None:
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in open_checkpoint(LORA).weights
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(open_checkpoint(FULL).weights)
    assert open_checkpoint(LORA).last_loss() == pytest.approx(7.6285, abs=1e-3)


def test_the_written_and_the_dumped_config_say_the_same() -> None:
    written, dumped = read_settings(XTUNER_CONFIG.read_text()), open_checkpoint(LORA).settings
    assert written == dumped
    assert written.lora == {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip


HOSTILE = [
    "import os\nos.system('touch canary')\n",
    "exec(\"open('canary', 'w')\")\n",
    "from evil import *\n",
    "accumulative_counts = __import__('os').system('touch canary')\n",
    "a = b\nb = a\naccumulative_counts = a\n",
    "x0 = 1\n" + "".join(f"x{n} = dict(a=x{n - 1}, b=x{n - 1})\n" for n in range(1, 200)) + "model = x199\n",
    "model = " + "dict(llm=" * 80 + "1" + ")" * 80 + "\n",
    "model = [model for model in ().__class__.__bases__]\n",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_config_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with quiet(but={"compile"}):  # ast.parse counts as compiling
        found = read_settings(text + "max_length = 77\n")
    assert found.max_length == 77 and found.accumulation == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\0'", "(" * 5000, "#" * (MAX_BYTES + 1)])
def test_a_text_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        read_settings(text)


def test_the_checkpoints_of_work_folders_are_listed(tmp_path: Path) -> None:
    for name, source in (("a/iter_96.pth", LORA), ("a/iter_600.pth", LORA), ("b/iter_96.pth", ZERO2)):
        copied(source, tmp_path / name)
    (tmp_path / "a" / "optimizer.pth").write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in checkpoints_in(tmp_path)]
    assert names == ["a/iter_600.pth", "a/iter_96.pth", "b/iter_96.pth"]
    assert checkpoints_in(tmp_path / "a")[0].name == "iter_600.pth" and checkpoints_in(tmp_path / "b/iter_96.pth") == []


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_bytes(b"#" * 50_000_000)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for name, said in (("large", "50,000,000 bytes"), ("binary", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(LORA, tmp_path / f"{name}.py")


def test_what_must_be_run_stays_unknown() -> None:
    assert read_settings("lr = find()\nmax_length = [n for n in (5,)]\nmodel = dict(lora=build())\n") == Settings()
    assert read_settings("lora = dict(r=rank(), lora_alpha=4 * 4)\nmodel = dict(lora=lora)").lora == {"lora_alpha": 16}
    assert read_settings("strategy = dict(gradient_accumulation_steps=8)").accumulation == 8
    quantized = read_settings("model = dict(llm=dict(quantization_config=dict(load_in_4bit=True)))")
    assert quantized.is_quantized


def test_a_plain_state_dict_is_taken_and_something_else_is_not(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "epoch_2.pth")
    found = open_checkpoint(tmp_path / "epoch_2.pth")
    assert (list(found.weights), found.iteration, found.method) == (["model.norm.weight"], 2, "full")
    torch.save({"a": 1}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path / "x.pth")


def test_adapters_of_two_ranks_are_named(tmp_path: Path) -> None:
    state = {f"llm.base_model.model.m{n}.lora_A.default.weight": torch.ones(n, 4) for n in (2, 3)}
    torch.save({"state_dict": state}, tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match=r"ranks \[2, 3\]"):
        open_checkpoint(tmp_path / "iter_1.pth").facts()
