"""Checkpoints of the real XTuner: converted, merged and split to its own bits; imported, and continued from."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from studio import faults
from studio.engine import beginning, convert, importing_checkpoint, merge, split
from studio.engine.foreign import in_our_format
from studio.engine.weights import known_base
from studio.errors import CheckpointError, ConfigError, ModelError, StudioError
from studio.foreign import beginnings
from studio.foreign.xtuner import open_checkpoint
from studio.models import model_fingerprint
from studio.store import checkpoints as store
from studio.store import open_db, runs
from tests.engine.folders import config_for, lora_checkpoint, make_base, tensors_of
from tests.engine.test_convert import Job
from tests.foreign.places import FULL, LORA, TINY_LLAMA, XTUNER_CONFIG, ZERO2, copied
from tests.foreign.test_files import EXPECTED, fingerprint


def expected(key: str) -> dict[str, list[Any]]:
    return {name: values[:3] for name, values in EXPECTED[key].items()}


def found(folder: Path) -> dict[str, list[Any]]:
    return {name: fingerprint(tensor) for name, tensor in tensors_of(folder).items()}


def converted(tmp_path: Path, pth: Path, **args: Any) -> Path:
    out = tmp_path / "out"
    convert.run(Job(tmp_path, pth=str(pth), out=str(out), base=str(TINY_LLAMA), **args))
    return out


@pytest.mark.parametrize(
    ("pth", "args", "key"),
    [
        (LORA, {}, "hf/lora/adapter_model.bin"),
        (LORA, {"fp32": True}, "hf/lora_fp32_safetensors"),
        (ZERO2, {}, "hf/lora_zero2/adapter_model.bin"),
        (FULL, {}, "hf/full/pytorch_model.bin"),
    ],
    ids=["lora", "lora in fp32", "DeepSpeed folder", "full"],
)
def test_conversions_have_xtuners_own_bits(tmp_path: Path, pth: Path, args: dict[str, Any], key: str) -> None:
    assert found(converted(tmp_path, pth, **args)) == expected(key)


def test_the_adapter_says_what_the_config_said_and_loads_in_plain_peft(tmp_path: Path) -> None:
    out = converted(tmp_path, LORA)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (8, 16, 0.1, "none")
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32), out)
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 28
    assert "internlm2_chat" not in (out / "chat_template.jinja").read_text()
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()  # the template it was trained with
    assert "96" in (out / "README.md").read_text()


def test_a_full_model_loads_in_plain_transformers_with_the_logits_of_xtuners(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path, FULL), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 3, 300, 500, 700, 4, 201, 3, 900, 1200, 42, 2000]])).logits
    golden = [-0.029812, 0.225273, -0.09646, 0.180027, 0.112018, -0.047049, 0.220521, -0.004295]
    assert torch.allclose(logits[0, 0, :8], torch.tensor(golden), atol=2e-6)


def test_an_adapter_is_converted_without_its_base_and_a_full_model_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert.run(Job(tmp_path, pth=str(LORA), out=str(out)))
    assert found(out) == expected("hf/lora/adapter_model.bin")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "/ft/base/tiny-llama"
    with pytest.raises(ModelError, match="--base"):
        convert.run(Job(tmp_path, pth=str(FULL), out=str(tmp_path / "full")))


def test_a_config_beside_the_checkpoint_is_read_and_not_run(tmp_path: Path) -> None:
    torch.save(without_config(), tmp_path / "iter_96.pth")
    config = tmp_path / "config.py"
    config.write_text(f"import os\nos.system('touch {tmp_path / 'canary'}')\n" + XTUNER_CONFIG.read_text())
    with pytest.raises(CheckpointError, match="lora_alpha"):
        converted(tmp_path, tmp_path / "iter_96.pth")
    out = converted(tmp_path, tmp_path / "iter_96.pth", config=str(config))
    assert found(out) == expected("hf/lora/adapter_model.bin")
    assert not (tmp_path / "canary").exists()


def without_config() -> dict[str, Any]:
    """As mmengine writes with save_optimizer=False, and no text of the config."""
    state = in_our_format(open_checkpoint(LORA), "")["state_dict"]
    return {"state_dict": {f"llm.{n}".replace(".weight", ".default.weight"): t.clone() for n, t in state.items()}}


def test_numbers_that_do_not_fit_and_parts_that_are_not_text_are_refused(tmp_path: Path) -> None:
    content = without_config()
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.full_like(content["state_dict"][name], 1e6)
    torch.save(content, tmp_path / "iter_1.pth")
    config = copied(XTUNER_CONFIG, tmp_path / "c.py")
    with pytest.raises(CheckpointError, match="--fp32"):
        converted(tmp_path, tmp_path / "iter_1.pth", config=str(config))
    assert converted(tmp_path, tmp_path / "iter_1.pth", config=str(config), dtype="bfloat16").is_dir()
    torch.save({"state_dict": {"llm.a": torch.ones(1), "projector.b": torch.ones(1)}}, tmp_path / "iter_2.pth")
    with pytest.raises(CheckpointError, match="projector"):
        converted(tmp_path, tmp_path / "iter_2.pth", overwrite=True)
    with pytest.raises(StudioError, match="int8"):
        converted(tmp_path, LORA, dtype="int8")


def test_a_merge_in_float16_has_xtuners_own_bits(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    convert.run(Job(tmp_path, pth=str(LORA), out=str(adapter), base=str(TINY_LLAMA)))
    merge.run(
        Job(
            tmp_path, base=str(TINY_LLAMA), adapter=str(adapter), out=str(tmp_path / "m"), dtype="float16", device="cpu"
        )
    )
    assert found(tmp_path / "m") == expected("merged/bin_fp16")


def merged(tmp_path: Path, base: Path, adapter: Path) -> dict[str, list[Any]]:
    out = tmp_path / "merged"
    merge.run(Job(tmp_path, base=str(base), adapter=str(adapter), out=str(out), dtype="float16", device="cpu"))
    return found(out)


def test_an_adapter_bin_of_older_tools_merges_alike(tmp_path: Path) -> None:
    """The base is stored in float32 here: it is rounded first, as XTuner loads it in float16."""
    base = copied(TINY_LLAMA, tmp_path / "base")
    save_file({n: t.float() for n, t in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    adapter = tmp_path / "adapter"
    convert.run(Job(tmp_path, pth=str(LORA), out=str(adapter), base=str(base)))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    for name in ("adapter_model.safetensors", "retune_weights.json"):
        (adapter / name).unlink()
    merge.run(
        Job(tmp_path, base=str(base), adapter=str(adapter), out=str(tmp_path / "m"), dtype="float16", device="cpu")
    )
    assert found(tmp_path / "m") == expected("merged/bin_fp16")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_split_writes_one_file_a_tensor_and_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    source = copied(TINY_LLAMA, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    result = split.run(Job(tmp_path, source=str(source), out=str(tmp_path / "out")))
    files = sorted(path.name for path in (tmp_path / "out").glob(f"*.{kind}"))
    assert result["tensors"] == len(files) == len(tensors) == 21
    stem = "pytorch_model" if kind == "bin" else "model"
    assert files[0] == f"{stem}-00001-of-00021.{kind}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    with pytest.raises(StudioError, match="there already"):
        split.run(Job(tmp_path, source=str(source), out=str(tmp_path / "out")))
    with pytest.raises(ModelError, match="no weights"):
        split.run(Job(tmp_path, source=str(tmp_path), out=str(tmp_path / "other")))


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A project's folder with one imported checkpoint."""
    result = importing_checkpoint.run(import_job(tmp_path))
    assert result == {"step": 6, "checkpoint": "runs/lora-1/step_6.pth", "run_id": "lora-1"}
    return tmp_path


def import_job(folder: Path) -> Job:
    job = Job(folder, path=str(LORA), base=str(TINY_LLAMA), name="")
    job.id = "a job"
    return job


@pytest.mark.parametrize("where", ["fsync", "row checkpoint"])
def test_an_import_that_fails_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(point: str, path: Path | None = None) -> None:
        if point == where and (path is None or path.name.startswith("step_")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(faults, "hit", fail)
    with pytest.raises((OSError, StudioError)):
        importing_checkpoint.run(import_job(tmp_path))
    with open_db(tmp_path) as db:
        assert runs.listed(db) == [] and store.listed(db) == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_imported_checkpoint_is_one_of_ours(imported: Path) -> None:
    with open_db(imported) as db:
        assert store.get(db, "lora-1", 6).path == "runs/lora-1/step_6.pth" and runs.get(db, "lora-1").step == 6
    convert.run(Job(imported, run_id="lora-1", step=6))
    assert found(imported / "hf/lora-1-step_6") == expected("hf/lora_fp32_safetensors")  # as it was trained


def test_an_imported_folder_takes_no_more_room_than_its_weights() -> None:
    """Weights of a DeepSpeed folder are views of flat pieces, which torch would save whole with each of them."""
    state = in_our_format(open_checkpoint(ZERO2), "")["state_dict"]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("source", [LORA, ZERO2], ids=["file", "folder"])
def test_a_run_begins_with_the_weights_of_an_xtuner_checkpoint(source: Path) -> None:
    config = fitted(source)
    assert (config.lora.rank, config.lora.alpha) == (8, 16) and "q_proj" in config.lora.target_modules
    model = ready(config)
    beginning.begin(model, source, "any base")
    weights = in_our_format(open_checkpoint(source), "")["state_dict"]
    state = model.state_dict()
    assert all(torch.equal(state[name.replace(".weight", ".default.weight")], each) for name, each in weights.items())


def test_a_run_begins_with_an_adapter_folder_an_imported_and_one_of_our_checkpoints(imported: Path) -> None:
    base = known_base(str(TINY_LLAMA))
    convert.run(Job(imported, run_id="lora-1", step=6))
    for source in (imported / "hf/lora-1-step_6", imported / "runs/lora-1/step_6.pth"):
        beginning.begin(ready(fitted(source)), source, base.fingerprint)
        with pytest.raises(CheckpointError, match="another base"):
            beginning.begin(ready(fitted(source)), source, "0" * 64)
    own_base = make_base(imported / "own")
    ours = lora_checkpoint(own_base, imported / "step_8.pth")
    begun = fitted(ours, own_base)
    beginning.begin(ready(begun, own_base), ours, model_fingerprint(own_base))


def test_dora_and_rslora_come_along(tmp_path: Path) -> None:
    """Named as XTuner saves what PEFT keeps: `lora_magnitude_vector.default.weight`."""
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32), lora)
    for name, each in theirs.named_parameters():
        each.data += 0.01 * torch.randn_like(each) if "lora_" in name else 0.0
    state = {f"llm.{name}": each for name, each in theirs.state_dict().items() if "lora_" in name}
    text = "model = dict(llm=dict(), lora=dict(type='LoraConfig', r=4, lora_alpha=8, use_dora=True, use_rslora=True))"
    torch.save({"state_dict": state, "meta": {"iter": 16, "cfg": text}}, tmp_path / "iter_16.pth")
    config = fitted(tmp_path / "iter_16.pth")
    assert (config.lora.rank, config.lora.dora, config.lora.rslora) == (4, True, True)
    assert open_checkpoint(tmp_path / "iter_16.pth").run_config(str(TINY_LLAMA), "x").lora.dora
    model = ready(config)
    beginning.begin(model, tmp_path / "iter_16.pth", "")
    ids = torch.tensor([[1, 3, 300, 500]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, theirs.eval()(ids).logits, atol=1e-6)
    without = config.model_copy(update={"lora": config.lora.model_copy(update={"rslora": False})})
    with pytest.raises(CheckpointError, match="rsLoRA"):
        beginning.begin(ready(without), tmp_path / "iter_16.pth", "")


def test_a_full_run_begins_with_full_weights() -> None:
    config = fitted(FULL, method="full")
    model = ready(config)
    beginning.begin(model, FULL, "")
    expected_ = in_our_format(open_checkpoint(FULL), "")["state_dict"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected_.items())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds an adapter"):
        fitted(LORA, method="full")
    with pytest.raises(ConfigError, match="full model"):
        fitted(FULL)
    with pytest.raises(CheckpointError, match="model.base"):
        fitted(TINY_LLAMA)
    with pytest.raises(CheckpointError):
        fitted(tmp_path / "nothing.pth")
    model = ready(fitted(LORA).model_copy(update={"lora": fitted(LORA).lora.model_copy(update={"alpha": 32})}))
    with pytest.raises(CheckpointError, match=r"\(8, 16.0, False\), the run \(8, 32.0, False\)"):
        beginning.begin(model, LORA, "")
    other = make_base(tmp_path / "other")
    with pytest.raises(CheckpointError, match="do not fit"):
        beginning.begin(ready(fitted(LORA, other), other), LORA, "")


def fitted(source: Path, base: Path = TINY_LLAMA, method: str = "lora") -> Any:
    config = config_for(base, method)
    return beginnings.fitting(
        config.model_copy(update={"model": config.model.model_copy(update={"continue_from": str(source)})})
    )


def ready(config: Any, base: Path = TINY_LLAMA) -> torch.nn.Module:
    from studio.engine.adapters import attach
    from studio.engine.models.load import load_base

    return attach(load_base(base, dtype=torch.float32, device=torch.device("cpu")), config)


KILLED = """
import sys
from pathlib import Path
from studio import faults
from studio.engine import importing_checkpoint
from tests.engine.test_xtuner_files import import_job
faults.arm("kill@row checkpoint")
importing_checkpoint.run(import_job(Path(sys.argv[1])))
"""


def test_what_a_killed_import_left_is_not_listed_and_goes_with_the_next(tmp_path: Path) -> None:
    """It dies with its file written and half of its rows."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with open_db(tmp_path) as db:
        assert runs.listed(db) == [] and store.listed(db) == []
        assert [run.id for run in runs.unfinished(db)] == ["lora-1"] and (tmp_path / "runs/lora-1").is_dir()
    assert importing_checkpoint.run(import_job(tmp_path))["run_id"] == "lora-1"
    with open_db(tmp_path) as db:
        assert [run.id for run in runs.listed(db)] == ["lora-1"] and runs.unfinished(db) == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lora-1"]
