"""The tutorial that teaches XTuner, command by command as it is printed (paths aside), on the starter model.

The config is the tutorial's, with its two paths changed as the tutorial says; `--cfg-options` keep it short.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from studio.paths import REPOSITORY

TUTORIAL = REPOSITORY / "tests" / "config" / "fixtures" / "tutorial.py.txt"
CONFIG = "internlm2_1_8b_qlora_alpaca_e3_copy.py"
SHORT = ["--cfg-options", "optim_wrapper.accumulative_counts=2", "train_cfg.max_iters=6", "max_length=128",
         "default_hooks.checkpoint.interval=4", "model.lora.r=4",
         "custom_hooks.1.max_new_tokens=2"]  # fmt: skip
ANSWER = "我是shane的小助手，内在是上海AI实验室书生·浦语的1.8B大模型哦"
Line = Callable[..., str]

pytestmark = pytest.mark.slow


@pytest.fixture
def ft(tmp_path: Path, starter: Path) -> Path:
    """/root/ft as the tutorial prepares it: model, data, config."""
    ft = tmp_path / "ft"
    for name in ("data", "config"):
        (ft / name).mkdir(parents=True)
    (ft / "model").symlink_to(starter.resolve(), target_is_directory=True)
    row = {"messages": [{"role": "user", "content": "请做一下自我介绍"}, {"role": "assistant", "content": ANSWER}]}
    (ft / "data" / "personal_assistant.json").write_text(
        json.dumps([row] * 101, ensure_ascii=False, indent=4), encoding="utf-8"
    )
    return ft


@pytest.fixture
def xtuner(ft: Path) -> Line:
    """`retune xtuner …` in a shell of its own, standing in /root/ft; the code must be 0 unless another is expected."""

    def line(typed: str, *words: str, code: int = 0, typing: str = "") -> str:
        command = [
            sys.executable,
            "-m",
            "studio.cli.app",
            "xtuner",
            *typed.replace("/root/ft", str(ft)).split(),
            *words,
        ]
        done = subprocess.run(
            command, cwd=ft, input=typing, capture_output=True, text=True, timeout=900, check=False,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MKL_SERVICE_FORCE_INTEL": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return line


def edit_config(ft: Path) -> None:
    """What the tutorial does by hand: the copied config with model and data of this machine."""
    text = TUTORIAL.read_text(encoding="utf-8").replace("/root/ft", str(ft))
    (ft / "config" / CONFIG).write_text(text, encoding="utf-8")


def test_the_tutorial(xtuner: Line, ft: Path) -> None:
    assert "internlm2_1_8b_qlora_alpaca_e3" in xtuner("list-cfg -p internlm2_1_8b")
    xtuner("copy-cfg internlm2_1_8b_qlora_alpaca_e3 /root/ft/config")
    assert list((ft / "config").glob("internlm2_1_8b_qlora_alpaca_e3_copy.*"))
    edit_config(ft)
    assert "messages" in xtuner("list-dataset-format")
    said = xtuner(f"train /root/ft/config/{CONFIG} --work-dir /root/ft/train", *SHORT)
    assert "$ retune train" in said and "distributed" not in said
    assert sorted(path.name for path in (ft / "train").glob("*.p*")) == [CONFIG, "iter_4.pth", "iter_6.pth"]

    said = xtuner(f"train /root/ft/config/{CONFIG} --work-dir /root/ft/train --resume /root/ft/train/iter_4.pth")
    assert "--resume step_2.pth" in said and (ft / "train" / "iter_6.pth").exists()
    assert (ft / "train" / "last_checkpoint").read_text().endswith("iter_6.pth")

    (ft / "huggingface").mkdir()
    to_hf = f"convert pth_to_hf /root/ft/train/{CONFIG} /root/ft/train/iter_6.pth /root/ft/huggingface"
    xtuner(to_hf, "--fp32", "--max-shard-size", "2GB")
    tensors = load_file(ft / "huggingface" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}

    (ft / "final_model").mkdir()
    xtuner("convert merge /root/ft/model /root/ft/huggingface /root/ft/final_model")
    assert json.loads((ft / "final_model" / "config.json").read_text())["dtype"] == "float16"
    assert list((ft / "final_model").glob("*.safetensors"))

    typed = "请你介绍一下你自己\n\nRESET\n\n你是谁\n\nEXIT\n\n"
    short = ("--max-new-tokens", "8")
    merged = xtuner("chat /root/ft/final_model --prompt-template internlm2_chat", *short, typing=typed)
    assert merged.count("  weights ") == 2 and "begins anew" in merged
    assert "was trained with the template default and is asked with internlm2_chat" in merged
    adapter = xtuner(
        "chat /root/ft/model --adapter /root/ft/huggingface --prompt-template default", *short, typing=typed
    )
    assert adapter.count("huggingface  weights ") == 2 and "warning" not in adapter


def test_the_tutorial_with_deepspeed(xtuner: Line, ft: Path) -> None:
    edit_config(ft)
    pytest.importorskip("deepspeed")
    line = f"train /root/ft/config/{CONFIG} --work-dir /root/ft/train_deepspeed --deepspeed deepspeed_zero2"
    said = xtuner(line, *SHORT)
    assert "distributed.strategy=deepspeed --set distributed.deepspeed=zero2" in said
    assert (ft / "train_deepspeed" / "iter_6.pth").is_dir()
    to_hf = f"convert pth_to_hf /root/ft/train_deepspeed/{CONFIG} /root/ft/train_deepspeed/iter_6.pth /root/ft/hf_zero"
    xtuner(to_hf)
    assert (ft / "hf_zero" / "adapter_model.safetensors").is_file()


def test_what_goes_wrong_is_said_and_ends_with_a_code(xtuner: Line, ft: Path) -> None:
    edit_config(ft)
    (ft / "data" / "personal_assistant.json").unlink()
    assert "personal_assistant.json" in xtuner(f"train /root/ft/config/{CONFIG}", code=1)
    assert "no checkpoint of a run here" in xtuner(
        f"train /root/ft/config/{CONFIG} --resume /root/ft/iter_1.pth", code=1
    )
