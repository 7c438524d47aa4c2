"""`convert`: what leaves the studio loads elsewhere, holds the very numbers that were trained, or is not written."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from studio.config.yaml import save_config
from studio.engine import convert
from studio.engine.weights import known_base, on_disk, weights_hash
from studio.engine.zero_folder import FolderWeights
from studio.errors import CheckpointError, ConfigError, StudioError, UnsafeFileError
from studio.foreign.deepspeed_folder import Piece, Weight
from studio.foreign.torch_file import open_dictionary
from studio.models import Kind, hub_folder, write_manifest
from studio.paths import sha256_of
from studio.store import checkpoints as store
from studio.store import open_db
from studio.weight_folders import shard_bytes
from tests.engine.folders import (
    config_for,
    full_checkpoint,
    lora_checkpoint,
    lora_model,
    make_base,
    tensors_of,
    write_checkpoint,
)

IDS = [[1, 70, 80, 90, 100, 2]]
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
if base:
    model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[3]))).logits
print(json.dumps({"text": text, "logits": logits.tolist(), "tokens": tokenizer(text).input_ids}))
"""


class Job:
    """What a verb needs of its job, without a process around it."""

    def __init__(self, folder: Path, **args: Any) -> None:
        self.folder, self.args, self.phases = folder, args, []

    def phase(self, phase: str, total: int = 0, unit: str = "") -> None:
        self.phases.append(phase)

    def progress(self, current: int) -> None:
        assert current > 0

    def check_stop(self) -> None:
        pass


def plain_tools(folder: Path, base: str | Path = "") -> dict[str, Any]:
    """Logits and a rendered chat from transformers and peft alone, in a process that knows nothing of the studio."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), str(base), json.dumps(IDS)],
        capture_output=True, text=True, env=environment, timeout=120, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", torch.bfloat16)


def convert_pth(tmp_path: Path, pth: Path, **args: Any) -> Path:
    out = tmp_path / "out"
    convert.run(Job(tmp_path, pth=str(pth), out=str(out), **args))
    return out


def test_an_adapter_loads_in_plain_peft_with_the_logits_that_were_trained(tmp_path: Path, base: Path) -> None:
    out = convert_pth(tmp_path, lora_checkpoint(base, tmp_path / "step_8.pth"))
    found = plain_tools(out, base)
    with torch.no_grad():
        expected = lora_model(base)(torch.tensor(IDS)).logits
    assert torch.allclose(torch.tensor(found["logits"]), expected, atol=1e-5)
    assert found["text"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert found["tokens"][0] == 1


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_an_adapter_names_its_base_as_other_tools_find_it(tmp_path: Path, hub: Kind) -> None:
    folder = make_base(hub_folder(hub, "owner/name"))
    write_manifest(folder, hub, "owner/name", "a test")
    name = "modelscope:owner/name" if hub == "modelscope" else "owner/name"
    assert known_base(name).reference == ("owner/name" if hub == "huggingface" else str(folder))


def test_an_adapter_keeps_every_bit(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "step_8.pth")
    trained = torch.load(pth, weights_only=True)["state_dict"]
    written = load_file(convert_pth(tmp_path, pth) / "adapter_model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) and written[name].dtype == torch.float32 for name in trained)


def test_a_full_model_takes_the_bases_format_unless_fp32_is_asked_for(tmp_path: Path, base: Path) -> None:
    pth = full_checkpoint(base, tmp_path / "step_8.pth")
    trained = torch.load(pth, weights_only=True)["state_dict"]
    short = tensors_of(convert_pth(tmp_path, pth))
    assert {tensor.dtype for tensor in short.values()} == {torch.bfloat16}
    out = convert_pth(tmp_path, pth, fp32=True, overwrite=True)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tensors_of(out).items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_model_loads_in_plain_transformers_from_shards(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    pth = full_checkpoint(base, tmp_path / "step_8.pth")
    out = convert_pth(tmp_path, pth, max_shard_size="40KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 42_000 for shard in shards)
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(base)
    expected.load_state_dict(torch.load(pth, weights_only=True)["state_dict"])
    with torch.no_grad():
        logits = expected.eval()(torch.tensor(IDS)).logits
    assert torch.allclose(torch.tensor(plain_tools(out)["logits"]), logits, atol=1e-5)


def test_the_card_and_the_seal_say_what_it_is(tmp_path: Path, base: Path) -> None:
    out = convert_pth(tmp_path, lora_checkpoint(base, tmp_path / "step_8.pth"))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "| step | 8 |" in card.text and str(tmp_path) not in card.text
    assert "| data fingerprint | identity abababababababab |" in card.text
    record = json.loads((out / "retune_weights.json").read_text())
    assert record["sha256"] == weights_hash(out) == sha256_of(out / "adapter_model.safetensors")
    assert record["step"] == 8 and record["base"] == str(base)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["inference_mode"] is True


def test_a_projects_checkpoint_is_found_by_run_and_step_and_noted(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "runs" / "tiny-1" / "step_8.pth")
    with open_db(tmp_path) as db:
        store.put(db, store.Checkpoint("tiny-1", 8, "runs/tiny-1/step_8.pth", sha256_of(pth), pth.stat().st_size))
    result = convert.run(Job(tmp_path, run_id="tiny-1", step=8, fp32=False))
    assert Path(result["path"]) == (tmp_path / "hf" / "tiny-1-step_8").resolve()
    with open_db(tmp_path) as db:
        (output,) = store.outputs(db, "hf")
    assert (output.path, output.run_id, output.step) == ("hf/tiny-1-step_8", "tiny-1", 8)
    assert output.detail["sha256"] == result["sha256"]


def test_the_config_may_be_a_file_or_a_run(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "runs" / "tiny-1" / "step_8.pth")
    save_config(tmp_path / "runs" / "tiny-1" / "config.yaml", config_for(base))
    for config in ("tiny-1", str(tmp_path / "runs" / "tiny-1" / "config.yaml")):
        assert (convert_pth(tmp_path, pth, config=config, overwrite=True) / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="neither a config file nor a run"):
        convert_pth(tmp_path, pth, config="tiny-2")


def test_a_config_of_another_method_is_refused(tmp_path: Path, base: Path) -> None:
    save_config(tmp_path / "full.yaml", config_for(base, "full"))
    with pytest.raises(ConfigError, match="was trained with lora"):
        convert_pth(tmp_path, lora_checkpoint(base, tmp_path / "step_8.pth"), config=str(tmp_path / "full.yaml"))


def test_a_base_that_changed_since_is_refused(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "step_8.pth")
    other = make_base(tmp_path / "other", torch.bfloat16, seed=9)
    save_config(tmp_path / "other.yaml", config_for(other))
    with pytest.raises(CheckpointError, match="belong to another base model"):
        convert_pth(tmp_path, pth, config=str(tmp_path / "other.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path, base: Path, damage: str, manifest: bool) -> None:
    pth = lora_checkpoint(base, tmp_path / "step_8.pth", manifest=manifest)
    content = bytearray(pth.read_bytes())
    if damage == "flipped":
        # The middle of one tensor's bytes, found by its content: elsewhere a flip may hit padding.
        tensor = next(iter(torch.load(pth, weights_only=True)["state_dict"].values()))
        content[content.index(tensor.numpy().tobytes()) + 5] ^= 0x10
    pth.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        convert_pth(tmp_path, pth)
    assert "step_8.pth" in caught.value.message and caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_pickle_bomb_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    torch.save({"meta": {"format": "retune/1"}, "state_dict": Bomb()}, tmp_path / "step_1.pth")
    with pytest.raises(UnsafeFileError):
        convert_pth(tmp_path, tmp_path / "step_1.pth")
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_nan_weights_are_not_passed_on(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "step_8.pth")
    content = torch.load(pth, weights_only=True)
    next(iter(content["state_dict"].values()))[0, 0] = float("nan")
    broken = write_checkpoint(
        tmp_path / "step_9.pth", base, "lora", content["state_dict"], content["meta"]["adapter_config"]
    )
    with pytest.raises(CheckpointError, match="NaN"):
        convert_pth(tmp_path, broken)


def test_a_full_checkpoint_that_lacks_a_tensor_is_named(tmp_path: Path, base: Path) -> None:
    state = torch.load(full_checkpoint(base, tmp_path / "step_8.pth"), weights_only=True)["state_dict"]
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="up_proj.weight is missing"):
        convert_pth(tmp_path, write_checkpoint(tmp_path / "step_9.pth", base, "full", state, None))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path: Path, base: Path) -> None:
    pth = lora_checkpoint(base, tmp_path / "step_8.pth")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(StudioError, match="thesis.txt"):
        convert_pth(tmp_path, pth)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    convert_pth(tmp_path, pth)
    with pytest.raises(StudioError, match="is there already"):
        convert_pth(tmp_path, pth)
    convert_pth(tmp_path, pth, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StudioError, match="notes.txt"):
        convert_pth(tmp_path, pth)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("size", ["", "big", "0GB", "-1GB", "1e3", "2 PB", None])
def test_shard_sizes_that_mean_nothing(size: Any) -> None:
    with pytest.raises(StudioError, match="no size"):
        shard_bytes(size)


def test_shard_sizes() -> None:
    assert shard_bytes("2GB") == 2 * 10**9 and shard_bytes("1.5 mb") == 1_500_000


def test_weights_of_a_folder_are_put_together_one_at_a_time(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.randn(60, 50) for number in range(4)}
    torch.save(tensors, tmp_path / "shards.pt")
    stored = open_dictionary(tmp_path / "shards.pt").content
    cut = {name: (Piece(each, 0, 1000), Piece(each, 1000, 2000)) for name, each in stored.items()}
    weights = FolderWeights({name: Weight((60, 50), pieces) for name, pieces in cut.items()})
    assert weights.num_elements == 4 * 3000 and list(weights) == list(tensors)
    seen: list[weakref.ref] = []
    for name in weights:
        tensor = weights[name]
        assert torch.equal(tensor, tensors[name])
        seen.append(weakref.ref(tensor))
        del tensor
        assert all(each() is None for each in seen)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says what memory a process holds")
def test_what_waits_on_the_disk_takes_no_memory_that_the_system_could_not_take_back(tmp_path: Path) -> None:
    tensor = torch.arange(2**24, dtype=torch.float32)
    before = own_memory()
    found = on_disk(tensor, tmp_path)
    assert own_memory() - before < tensor.nbytes / 8
    assert torch.equal(found, tensor) and list(tmp_path.iterdir()) == []
    assert on_disk(torch.empty(0, 3), tmp_path).shape == (0, 3)


def own_memory() -> int:
    """Bytes of this process that stand in no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024
