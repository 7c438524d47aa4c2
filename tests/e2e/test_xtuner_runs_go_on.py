"""What the real XTuner trained goes on here, in the shell as a person types it: brought in, continued, asked."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.paths import REPOSITORY
from tests.foreign.places import FULL, TINY_LLAMA, ZERO2

pytestmark = pytest.mark.slow
Line = Callable[..., str]
CONFIG = """
name: more
method: {method}
model: {{base: {base}, dtype: float32}}
data: {{sources: {{chats: all}}, max_length: 128, valid_share: 0, template: internlm2_chat}}
train: {{num_steps: 1, warmup_steps: 0, micro_batch_size: 1, gradient_accumulation_steps: 1}}
record: {{sample_prompts: [], evaluate_every_steps: 0}}
"""


@pytest.fixture
def retune(tmp_path: Path) -> Line:
    def line(*words: object, typing: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "studio.cli.app", *map(str, words)], cwd=tmp_path, input=typing,
            capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RETUNE_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return line


@pytest.mark.parametrize(("source", "method"), [(ZERO2, "lora"), (FULL, "full")], ids=["lora", "full"])
def test_a_run_of_xtuner_goes_on(retune: Line, tmp_path: Path, source: Path, method: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Who are you?", "answer": "Luna."}\n' * 4, encoding="utf-8")
    (tmp_path / "more.yaml").write_text(CONFIG.format(method=method, base=TINY_LLAMA), encoding="utf-8")
    retune("project", "new", "mine")
    retune("data", "import", "rows.jsonl", "--dataset", "chats")
    retune("checkpoints", "import", source, "--base", TINY_LLAMA, "--name", "theirs")
    said = retune("train", "more.yaml", "--continue-from", "theirs-1", "--allow-lint-errors")
    assert "more-1 finished at step 1/1" in said
    asked = retune(
        "chat", "--base", TINY_LLAMA, "--adapter", "theirs-1", "--max-new-tokens", 4, typing="Who are you?\n\nEXIT\n\n"
    )
    assert asked.count("  weights ") == 2 and "theirs-1-step_6" in asked
