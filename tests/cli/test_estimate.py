"""`retune estimate`: verdict, figures, suggestions; and a real run's peak beside what was predicted."""

import json
from pathlib import Path

import pytest

from studio import forecast, runs
from studio.projects import Project
from tests.cli.conftest import Retune, settings
from tests.test_model_shapes import LLAMA_2_7B

TIGHT = ("--set", "train.micro_batch_size=1", "--set", "train.gradient_checkpointing=true")


@pytest.fixture
def seven_b(tmp_path: Path) -> tuple[str, ...]:
    """Llama-2-7B as a folder with nothing but its config.json."""
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    return ("--set", f"model.base={folder}", "--device", "cuda", "--memory", "8GB")


def test_yes_to_a_7b_qlora_on_8_gb(retune: Retune, seven_b: tuple[str, ...]) -> None:
    said = retune("estimate", "starter_qlora", *seven_b, *TIGHT)
    assert "it fits into 8.0 GB" in said and "quantisation" in said


def test_no_to_a_7b_lora_on_8_gb_with_what_would_fit(retune: Retune, seven_b: tuple[str, ...]) -> None:
    said = retune("estimate", "starter_lora", *seven_b, *TIGHT, code=1)
    assert "it does not fit" in said
    assert "method=qlora" in said and "fits" in said.rsplit("method=qlora", 1)[1]


def test_checkpointing_that_memory_asks_for_is_counted(retune: Retune, seven_b: tuple[str, ...]) -> None:
    on, off = ("estimate", "starter_qlora", *seven_b), ("estimate", "starter_qlora", *seven_b[:4], "--memory", "800GB")
    assert "With gradient checkpointing." in retune(*on) and "checkpointing." not in retune(*off)


def test_json(retune: Retune, seven_b: tuple[str, ...]) -> None:
    found = json.loads(retune("estimate", "starter_lora", *seven_b, "--json", code=1))
    assert not found["fits"] and found["suggestions"][-1]["fits"]
    parts = found["memory_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert found["num_steps"] == 60 and found["seconds"] is None


def test_it_is_spread_as_train_spreads_it(
    retune: Retune, seven_b: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    base = ("estimate", "starter_lora", *seven_b[:2], "--device", "cpu", "--memory", "4TB", "--json")
    copies, shared = (json.loads(retune(*base, *more)) for more in ((), ("--deepspeed", "zero3")))
    assert copies["num_processes"] == shared["num_processes"] == 4
    assert shared["memory_bytes"]["weights"] < copies["memory_bytes"]["weights"]


def test_a_gpu_that_is_not_here_must_say_its_memory(retune: Retune) -> None:
    assert "--memory" in retune("estimate", "starter_lora", "--device", "cuda", code=1)
    assert "is no size" in retune("estimate", "starter_lora", "--memory", "big", code=1)


def test_a_model_that_is_not_here(retune: Retune) -> None:
    assert "not on this machine" in retune("estimate", "starter_lora", "--set", "model.base=some/model", code=1)


def test_a_run_is_held_against_its_forecast(retune: Retune, trained: Project, tiny_model: Path) -> None:
    """A real process: the model is tiny, so what is compared is mostly what libraries and engine hold, of which a short
    run uses a part."""
    run = runs.get_run(trained, "tiny-1")
    found = forecast.outcome(trained, run)
    assert found and -0.3 < found.memory_error < 1
    said = retune("estimate", "starter_lora", *settings(tiny_model), "--project", "tiny")
    assert "as fast as run tiny-1" in said and "counted on the stored tokens" in said
