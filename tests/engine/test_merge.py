"""`merge`: the merged model says what base and adapter say together, or the result says that it does not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from studio.engine import convert, merge
from studio.engine.adapter_files import read_adapter
from studio.engine.equality import TOLERANCE, Agreement, compare, make_reference
from studio.engine.equivalence import expected_of, verdict_of_folder
from studio.engine.folding import FoldedWeights, attach
from studio.engine.models.load import load_base
from studio.errors import CheckpointError, ModelError, StudioError, UnsafeFileError
from studio.store import checkpoints as store
from studio.store import open_db
from tests.engine.folders import as_torch_file, lora_checkpoint, lora_model, make_base, tensors_of
from tests.engine.test_convert import IDS, Job, plain_tools

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def base(tmp_path: Path, dtype: torch.dtype) -> Path:
    return make_base(tmp_path / "base", dtype)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    pth = lora_checkpoint(base, tmp_path / "runs" / "tiny-1" / "step_8.pth")
    convert.run(Job(tmp_path, pth=str(pth), out=str(tmp_path / "adapter")))
    return tmp_path / "adapter"


def merge_it(tmp_path: Path, base: Path, adapter: Path, **args: Any) -> dict[str, Any]:
    args = {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "merged"), "device": "cpu"} | args
    return merge.run(Job(tmp_path, **args))


def test_merged_equals_base_and_adapter_in_plain_transformers(
    tmp_path: Path, base: Path, adapter: Path, dtype: torch.dtype
) -> None:
    result = merge_it(tmp_path, base, adapter)
    with torch.no_grad():
        expected = lora_model(base)(torch.tensor(IDS)).logits
    found = torch.tensor(plain_tools(tmp_path / "merged")["logits"])
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt()
    assert error < TOLERANCE[dtype]
    assert result["verified"] and result["agreement"]["relative_error"] < TOLERANCE[dtype]
    assert result["agreement"]["folding_error"] < TOLERANCE[torch.float32], "before rounding they are the same"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "merged").values()} == {dtype}


@pytest.mark.parametrize("older", [False, True])
def test_where_memory_is_short_the_models_own_format_is_computed_in(
    base: Path, dtype: torch.dtype, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = as_torch_file(base) if older else base
    num_bytes = sum(path.stat().st_size for path in base.iterdir())
    for free, expected in ((100 * num_bytes, torch.float32), (num_bytes // 4, dtype)):
        monkeypatch.setattr(merge.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert merge._arithmetic(base, torch.device("cpu")) == expected


def test_the_sum_is_rounded_once(tmp_path: Path, base: Path, adapter: Path, dtype: torch.dtype) -> None:
    merge_it(tmp_path, base, adapter)
    merged, before, update = tensors_of(tmp_path / "merged"), tensors_of(base), tensors_of(adapter)
    name = "model.layers.0.self_attn.q_proj"
    a, b = (update[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    exact = before[f"{name}.weight"].float() + 16 / 4 * (b @ a)
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert ((merged[f"{name}.weight"].float() - exact).abs() <= unit * exact.abs() + 1e-6).all()
    assert not torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"])


def test_reading_a_folded_weight_leaves_the_base_as_it_is(base: Path, adapter: Path) -> None:
    """A `.bin` file is mapped into memory: what PEFT adds in place there, the next reader would find."""
    weights, name = FoldedWeights(as_torch_file(base), read_adapter(adapter)), "model.layers.0.mlp.up_proj.weight"
    before, folded = (found.clone() for found in (weights.before(name), weights.read(name)))
    assert torch.equal(weights.read(name), folded) and not torch.equal(folded, before.float())
    assert torch.equal(weights.before(name), before)


def test_files_figures_and_record(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "project.json").write_text("{}")
    result = merge_it(tmp_path, base, adapter, max_shard_size="30KB", run_id="tiny-1", step=8)
    out = tmp_path / "merged"
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 2
    names = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md", "config.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    record = json.loads((out / "retune_weights.json").read_text())
    assert record["verified"] is True and record["agreement"] == result["agreement"]
    assert "Passed" in (out / "README.md").read_text()
    with open_db(tmp_path) as db:
        (output,) = store.outputs(db, "merged")
    assert (output.path, output.run_id, output.step, output.detail["verified"]) == ("merged", "tiny-1", 8, True)


def test_a_difference_is_noticed(tmp_path: Path, base: Path, adapter: Path, dtype: torch.dtype) -> None:
    """A model that lost one layer's update, or is the plain base, must not pass as the merged one."""
    loaded = load_base(base, dtype=torch.float32, device=CPU)
    reference = make_reference(loaded, attach(loaded.model, merge.read_adapter(adapter)))
    assert not compare(load_base(base, dtype=torch.float32, device=CPU), reference, dtype).verified
    merge_it(tmp_path, base, adapter)
    good = load_base(tmp_path / "merged", dtype=torch.float32, device=CPU)
    assert compare(good, reference, dtype).verified
    name = "model.layers.0.mlp.down_proj.weight"
    good.model.load_state_dict({name: tensors_of(base)[name].float()}, strict=False)
    agreement = compare(good, reference, dtype)
    assert not agreement.verified
    good.model.lm_head.weight.data[:] = float("nan")
    assert not compare(good, reference, dtype).verified


def test_another_base_is_refused(tmp_path: Path, base: Path, adapter: Path, dtype: torch.dtype) -> None:
    other = make_base(tmp_path / "other", dtype, seed=5)
    with pytest.raises(CheckpointError, match="belong to another base model"):
        merge_it(tmp_path, other, adapter)
    with pytest.raises(ModelError):
        merge_it(tmp_path, tmp_path / "nowhere", adapter)
    assert not (tmp_path / "merged").exists()


def test_a_foreign_adapter_of_another_shape_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    (adapter / "retune_weights.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        merge_it(tmp_path, base, adapter)
    save_file(tensors | {name: torch.zeros(4, 999)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        merge_it(tmp_path, base, adapter)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, base: Path, adapter: Path, damage: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes({"truncated": content[:-100], "flipped": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        merge_it(tmp_path, base, adapter)
    assert caught.value.hint and not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "IA3"},
    ],
)
def test_an_adapter_config_that_imports_or_is_no_lora(
    tmp_path: Path, base: Path, adapter: Path, change: dict[str, Any]
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsafeFileError if "peft_type" not in change else CheckpointError):
        merge_it(tmp_path, base, adapter)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_an_adapter_config_that_is_no_json(tmp_path: Path, base: Path, adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError):
        merge_it(tmp_path, base, adapter)


def test_neither_the_adapter_nor_the_base_is_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    for place in (base, adapter):
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        with pytest.raises(StudioError):
            merge_it(tmp_path, base, adapter, out=str(place))
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_an_update_that_overflows_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    (adapter / "retune_weights.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="infinite or NaN"):
        merge_it(tmp_path, base, adapter)
    assert not (tmp_path / "merged").exists()


def test_a_fault_in_folding_shows_however_coarse_the_rounding() -> None:
    """One layer left out of many moves logits less than bfloat16's rounding does; float32 tells them apart."""
    figures = {"relative_error": 0.01, "tolerance": 0.1, "max_abs_difference": 0.1, "same_tokens": 1.0}
    answers = {"same_answers": 8, "near_ties": 0, "num_answers": 8}
    assert Agreement(**figures, **answers, folding_error=3e-6).verified
    assert not Agreement(**figures, **answers, folding_error=4e-3).verified
    assert not Agreement(**figures, **answers | {"same_answers": 7}).verified


def test_what_lies_there_is_replaced_only_when_asked(tmp_path: Path, base: Path, adapter: Path) -> None:
    first = merge_it(tmp_path, base, adapter)
    with pytest.raises(StudioError, match="is there already"):
        merge_it(tmp_path, base, adapter)
    assert merge_it(tmp_path, base, adapter, overwrite=True)["sha256"] == first["sha256"]


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_number_formats_with_the_gate_beside_them(tmp_path: Path, target: str) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = converted(tmp_path, base)
    result = merge_it(tmp_path, base, adapter, dtype=target)
    assert {str(each.dtype) for each in tensors_of(tmp_path / "merged").values()} == {f"torch.{target}"}
    gate = json.loads((tmp_path / "merged" / "gate.json").read_text())
    assert gate["passed"] and gate["figures"] == result["agreement"] and gate["other_prompts"] == []
    assert target in (tmp_path / "merged" / "README.md").read_text()


def test_another_template_fails_a_merged_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = converted(tmp_path, base)
    expected = expected_of(base, read_adapter(adapter), torch.float32, CPU).reference
    merge_it(tmp_path, base, adapter)
    template = tmp_path / "merged" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant: "))
    verdict = verdict_of_folder(tmp_path / "merged", expected, torch.float32, CPU, 1e-4)
    assert verdict.agreement.verified and verdict.other_prompts and not verdict.passed


def test_qlora_onto_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    """Folded into the unpacked 4-bit weights, it says what the 4-bit base and the adapter say."""
    base = make_base(tmp_path / "base", hidden_size=64)
    adapter = converted(tmp_path, base)
    result = merge_it(tmp_path, base, adapter, onto="dequantised")
    assert result["verified"] and result["onto"] == "dequantised" and result["agreement"]["folding_error"] < 1e-4
    assert "squeezed to 4 bits" in (tmp_path / "merged" / "README.md").read_text()
    expected = expected_of(base, read_adapter(adapter), torch.float32, CPU).reference
    other = verdict_of_folder(tmp_path / "merged", expected, torch.float32, CPU, 1e-4)
    assert other.agreement.relative_error > 0.01
    with pytest.raises(StudioError, match="Allowed: base, dequantised"):
        merge_it(tmp_path, base, adapter, onto="air")


def test_an_adapter_on_a_tied_embedding_parts_it_from_the_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    pair = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in pair.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    pair.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_it(tmp_path, base, tmp_path / "adapter")
    assert result["verified"], result["message"]
    merged = tensors_of(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], tensors_of(base)["model.embed_tokens.weight"])


def converted(tmp_path: Path, base: Path) -> Path:
    pth = lora_checkpoint(base, tmp_path / "runs" / "tiny-1" / "step_8.pth")
    convert.run(Job(tmp_path, pth=str(pth), out=str(tmp_path / "adapter")))
    return tmp_path / "adapter"
