"""`export`: what leaves for another tool answers as what was trained, or is marked as a failure."""

import json
import os
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quants
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from studio import exports, scores
from studio.data.go_template import GoTemplate, go_template
from studio.data.named import load_template, template_names
from studio.data.template import ChatTemplate
from studio.engine import convert, equality, equivalence, export, ollama
from studio.engine.adapter_files import read_adapter
from studio.engine.equivalence import Expected, expected_of
from studio.engine.folding import FoldedWeights
from studio.engine.gguf import checking, k_quants, llama_cpp, writer
from studio.engine.gguf.vocabulary import vocabulary_of
from studio.engine.weighing import ALLOWED
from studio.errors import DataError, ModelError, StudioError
from studio.machine import LLAMA_CPP_PACKAGES
from studio.store import checkpoints as store
from studio.store import open_db, runs
from studio.store.runs import Run
from tests import scored
from tests.data.tokenizers_for_tests import write_model_folder
from tests.engine.folders import lora_checkpoint, tensors_of
from tests.engine.test_convert import Job

CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
RAMP = {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}  # fmt: skip


def make_model(folder: Path, config: Any, family: str = "byte_level", template: str = CHATML) -> Path:
    """A small random model with a trained tokenizer, such as a GGUF file can hold."""
    write_model_folder(folder, family, template)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`."""
    folder = tmp_path_factory.mktemp("export")
    base = make_model(folder / "base", LlamaConfig(**SHAPE, tie_word_embeddings=True))
    pth = lora_checkpoint(base, folder / "runs" / "tiny-1" / "step_8.pth")
    convert.run(Job(folder, pth=str(pth), out=str(folder / "adapter")))
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> Expected:
    return expected_of(place / "base", read_adapter(place / "adapter"), torch.float32, CPU)


@pytest.fixture
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (equality, equivalence, checking, ollama):
        monkeypatch.setattr(module, "PROBES", ("Who are you?", "你是谁？"))


def export_it(place: Path, out: Path, **args: Any) -> dict[str, Any]:
    args = {"kind": "gguf", "weights": str(place / "adapter"), "out": str(out), "format": "f16"} | args
    return export.run(Job(out.parent, **args))


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize("kind", ["gguf", "adapter", "merged"])
def test_the_card_tells_scores_data_and_versions(place: Path, tmp_path: Path, kind: str) -> None:
    """The newest standard scorecard of that very checkpoint, and no other."""
    (tmp_path / "project.json").write_text("{}")
    newest, other_step, other_suite = (
        scored.card(step, [True] * hits + [False] * (10 - hits), [False] * 10, run_id="tiny-1", loss=11.0)[0]
        for step, hits in ((8, 9), (4, 3), (8, 2))
    )
    older = replace(newest, id="older", scores=other_step.scores, created_at="2020-01-01T00:00:00+00:00")
    frozen = {"datasets": {"identity": {"version": 3, "fingerprint": "ab" * 32}}}
    with open_db(tmp_path) as db:
        scored.store(db, (older, []), (other_step, []), (newest, []), (replace(other_suite, suite="format"), []))
        runs.add(db, Run("tiny-1", "tiny", "base", "lora", detail=frozen))
    export_it(place, tmp_path / "luna", kind=kind, format="float16" if kind == "merged" else "f16")
    card = (tmp_path / "luna" / "README.md").read_text()
    row = scores.triple(newest.scores["identity"]["tuned"])
    told = f"90.0 % [{100 * row[1]:.1f}, {100 * row[2]:.1f}]"
    assert f"| Knows who it is | 0.0 % [0.0, 27.8] | {told} |" in card
    assert "| Perplexity on the base's own answers | 0.0 % | +10.5 % [+10.5, +10.5] missed |" in card
    assert ("An adapter for" if kind == "adapter" else "A model fine-tuned from") in card
    assert f"| data | identity version 3, sha256 {'ab' * 32} |" in card and "| made with | torch " in card


def write(path: Path, base: Path, expected: Expected, form: str = "f16", weights: FoldedWeights | None = None) -> Path:
    weights = weights or FoldedWeights(base)
    vocabulary = vocabulary_of(expected.tokenizer, weights.config.vocab_size)
    speech = export.speech_of(vocabulary, expected)
    writer.write(Job(path.parent), path, weights, speech, writer.FORMATS[form], {"name": "x"})
    return path


def test_a_gguf_file_answers_as_base_and_adapter(place: Path, tmp_path: Path) -> None:
    (tmp_path / "project.json").write_text("{}")
    result = export_it(place, tmp_path / "luna")
    assert result["passed"], result["message"]
    assert result["figures"]["relative_error"] < 0.01 and "llama" in result["read_with"]
    gate = json.loads((tmp_path / "luna" / "gate.json").read_text())
    assert gate["passed"] and gate["files"] == ["README.md", "gate.json", "luna-f16.gguf"]
    assert (
        gate["data_fingerprints"] == {"identity": "ab" * 32} and "Passed" in (tmp_path / "luna/README.md").read_text()
    )
    with open_db(tmp_path) as db:
        (output,) = store.outputs(db, "export")
    assert (output.path, output.step, output.detail["passed"]) == ("luna", 8, True)
    with pytest.raises(StudioError, match="is there already"):
        export_it(place, tmp_path / "luna")
    assert export_it(place, tmp_path / "luna", overwrite=True)["passed"]


@pytest.mark.usefixtures("few_probes")
def test_a_checkpoint_of_a_run(place: Path, tmp_path: Path) -> None:
    """It is converted for the export where that was not done, and nothing of that stays behind."""
    (tmp_path / "project.json").write_text("{}")
    pth = lora_checkpoint(place / "base", tmp_path / "runs" / "tiny-1" / "step_8.pth")
    with open_db(tmp_path) as db:
        store.put(db, store.Checkpoint("tiny-1", 8, "runs/tiny-1/step_8.pth", "", pth.stat().st_size))
    for kind, folder in (("ollama", "exports/luna-f16"), ("merged", "merged/luna")):
        args = {"kind": kind, "run_id": "tiny-1", "step": 8, "out": str(tmp_path / folder)}
        assert export.run(Job(tmp_path, **args))["passed"]
    assert (tmp_path / "exports" / "luna-f16" / "luna-f16.gguf").is_file()
    with open_db(tmp_path) as db:
        assert {(each.kind, each.run_id, each.step) for each in store.outputs(db)} == {
            ("export", "tiny-1", 8),
            ("merged", "tiny-1", 8),
        }
    assert not list((tmp_path / "exports").glob(".scratch/*"))


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize("form", ["f32", "bf16", "q8_0"])
def test_other_formats_pass_too(place: Path, tmp_path: Path, form: str) -> None:
    result = export_it(place, tmp_path / "luna", format=form)
    assert result["passed"], result["message"]
    assert (tmp_path / "luna" / f"luna-{form}.gguf").is_file()


@pytest.mark.parametrize("by_llama_cpp", [True, False])
def test_damage_fails(
    place: Path, tmp_path: Path, expected: Expected, by_llama_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another template, a base without its adapter, and weights that are a little too large."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: by_llama_cpp)
    base, adapter = place / "base", read_adapter(place / "adapter")
    other = ChatTemplate(CHATML.replace("\n' + m", " ' + m"), expected.template.special_tokens)
    scaled = FoldedWeights(base, adapter)
    read = scaled.read
    monkeypatch.setattr(scaled, "read", lambda name: read(name) * (1.3 if "layers.1.mlp.up" in name else 1))
    good = write(tmp_path / "good.gguf", base, expected, weights=FoldedWeights(base, adapter))
    spoken_otherwise = replace(expected, template=other)
    files = {
        "template": write(tmp_path / "a.gguf", base, spoken_otherwise, weights=FoldedWeights(base, adapter)),
        "adapter": write(tmp_path / "b.gguf", base, expected),
        "weights": write(tmp_path / "c.gguf", base, expected, weights=scaled),
    }  # fmt: skip
    assert checking.verdict_of_file(good, expected, "f16", 1).passed
    found = {name: checking.verdict_of_file(path, expected, "f16", 1) for name, path in files.items()}
    assert not any(verdict.passed for verdict in found.values())
    assert found["template"].other_prompts and found["template"].agreement.verified
    assert not found["adapter"].agreement.verified and not found["weights"].agreement.verified
    assert found["adapter"].message.startswith("Failed: ")


@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_small_damage_is_seen_in_the_tensors(
    place: Path, tmp_path: Path, expected: Expected, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the answers need not show: 2 % in one matrix, and an adapter a tenth as strong that was left out."""
    base, adapter = place / "base", read_adapter(place / "adapter")
    weak = replace(
        adapter, tensors={name: each * (0.1 if "lora_B" in name else 1) for name, each in adapter.tensors.items()}
    )
    wanted, scaled = FoldedWeights(base, weak), FoldedWeights(base, weak)
    monkeypatch.setattr(scaled, "read", lambda name: wanted.read(name) * (1.02 if "layers.1.mlp.up" in name else 1))
    files = {"good": wanted, "scaled": scaled, "without": FoldedWeights(base)}
    found = {
        name: checking.weigh_file(write(tmp_path / f"{name}.gguf", base, expected, form, weights), wanted, form)
        for name, weights in files.items()
    }
    assert [name for name, each in found.items() if each.passed] == ["good"], found
    assert found["scaled"].scale_of == "blk.1.ffn_up.weight"
    assert found["without"].adapter_share == pytest.approx(0, abs=0.1)


@pytest.mark.usefixtures("few_probes")
def test_llama_cpp_runs_the_file(place: Path, tmp_path: Path) -> None:
    """By llama-cpp-python where that is installed (it compiles for many minutes), else by xllamacpp."""
    package = next(each for each in llama_cpp.RUNTIMES if find_spec(each))
    result = export_it(place, tmp_path / "luna")
    names = {"llama_cpp": "llama-cpp-python", "xllamacpp": "llama.cpp (xllamacpp"}
    assert result["passed"] and result["read_with"].startswith(names[package]), result["message"]


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize(
    ("config", "family"),
    [
        (LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True), "sentencepiece"),
        (LlamaConfig(**SHAPE, rope_parameters=LLAMA3), "byte_level"),
        (LlamaConfig(**SHAPE, rope_parameters=YARN | {"attention_factor": 1.6}), "byte_level"),
        (LlamaConfig(**SHAPE, rope_parameters=YARN | RAMP), "byte_level"),
        (LlamaConfig(**SHAPE, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}), "byte_level"),
        (LlamaConfig(**SHAPE, rope_parameters=LONGROPE | {"original_max_position_embeddings": 8}), "byte_level"),
        (LlamaConfig(**SHAPE, rope_parameters=LONGROPE | {"original_max_position_embeddings": 256}), "byte_level"),
        (MistralConfig(**SHAPE, sliding_window=128), "byte_level"),
        (Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=YARN), "byte_level"),
        (Qwen3Config(**SHAPE, head_dim=32), "byte_level"),
    ],
    ids=[
        "llama",
        "llama3",
        "yarn",
        "yarn-own-ramp",
        "yarn-mscale",
        "longrope-beyond",
        "longrope-within",
        "mistral",
        "qwen2-yarn",
        "qwen3",
    ],  # fmt: skip
)
def test_families(tmp_path: Path, config: Any, family: str) -> None:
    base = make_model(tmp_path / "base", config, family)
    found = expected_of(base, None, torch.float32, CPU)
    verdict = checking.verdict_of_file(write(tmp_path / "x.gguf", base, found), found, "f16", 1)
    assert verdict.agreement.relative_error < 0.01, verdict.message
    place = {"mistral": "llama"}.get(config.model_type, config.model_type)
    context = checking.Facts(tmp_path / "x.gguf").value(f"{place}.context_length")
    assert context == (128 if config.model_type == "mistral" else 512), "no farther than its window"
    assert not verdict.lacking_ends and not verdict.other_prompts, verdict.message


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", LlamaConfig(**SHAPE))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    with pytest.raises(ModelError, match="cuts text"):
        export_it(tmp_path, tmp_path / "x", weights=str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="gelu"):
        export_it(tmp_path, tmp_path / "x", weights=str(base))
    for name, value in RAMP.items():
        with pytest.raises(ModelError, match="QWEN2 knows none"):
            writer.require_writable(Qwen2Config(**SHAPE, rope_parameters=YARN | {name: value}))
    with pytest.raises(StudioError, match="Allowed: f32, f16"):
        export_it(tmp_path, tmp_path / "x", weights=str(base), format="q9")
    assert not (tmp_path / "x").exists()


QUANTIZE = """#!{python}
import sys
source, target, form, threads = sys.argv[1:]
assert form == "Q6_K" and int(threads) >= 1, sys.argv
content = bytearray(open(source, "rb").read())
{damage}
open(target, "wb").write(content)
"""
DAMAGE = {
    "none": "",
    "weights": "half = len(content) // 2; content[half : half + 20000] = content[:20000]",
    "error": "sys.exit('main: failed to quantize')",
    "nothing": "sys.exit(0)",
}


def on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> None:
    """A program of that name, found first; the test's own Python runs it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize("damage", DAMAGE)
def test_k_quants_by_llama_cpps_tool(place: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that hands on f16 weights passes; what it spoils fails the gate, and what it does not write is told."""
    script = QUANTIZE.format(python=sys.executable, damage=DAMAGE[damage])
    on_path(monkeypatch, tmp_path / "bin", "llama-quantize", script)
    out = tmp_path / "luna-q6_k"
    if damage in ("error", "nothing"):
        with pytest.raises(StudioError, match="failed to quantize|wrote no luna-q6_k.gguf"):
            export_it(place, out, format="q6_k")
        assert not out.exists()
        return
    result = export_it(place, out, format="q6_k")
    assert result["passed"] == (damage == "none"), result["message"]
    assert result["figures"]["tolerance"] == checking.TOLERANCE["q6_k"] and result["weights"]["allowed"] == 0.04
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "gate.json", "luna-q6_k.gguf"]


def test_every_format_on_offer_is_known_to_the_writer_and_the_gate() -> None:
    assert set(exports.GGUF_FORMATS) == set(writer.FORMATS) == set(checking.TOLERANCE) == set(ALLOWED)
    assert set(llama_cpp.RUNTIMES) == set(k_quants.LIBRARIES) == set(LLAMA_CPP_PACKAGES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows that blocks of k-quants divide, and layers enough to be rounded differently."""
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return make_model(tmp_path_factory.mktemp("wide") / "base", LlamaConfig(**shape, tie_word_embeddings=True))


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize("form", exports.K_QUANTS)
def test_k_quants_by_llama_cpps_library(wide: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds what it should and llama.cpp runs it; the same damage is seen as in the finer formats."""
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted, scaled = FoldedWeights(wide), FoldedWeights(wide)
    expected = expected_of(wide, None, torch.float32, CPU)
    path = write(tmp_path / "x.gguf", wide, expected, form, wanted)
    assert checking.weigh_file(path, wanted, form).passed
    most = {"q6_k": 0.3, "q5_k_m": 0.5, "q4_k_m": 0.8}[form]  # random weights amplify rounding more than learnt ones
    assert checking.verdict_of_file(path, expected, form, 1).agreement.relative_error < most
    monkeypatch.setattr(scaled, "read", lambda name: wanted.read(name) * (1.05 if "layers.1.mlp.up" in name else 1))
    found = checking.weigh_file(write(tmp_path / "y.gguf", wide, expected, form, scaled), wanted, form)
    assert not found.passed and found.scale_of == "blk.1.ffn_up.weight"


def test_k_quants_give_more_bits_where_errors_cost_most(wide: Path, tmp_path: Path) -> None:
    """As llama.cpp's own tool chooses: of four layers the first is none of an eighth, the last is."""
    expected = expected_of(wide, None, torch.float32, CPU)
    path = write(tmp_path / "x.gguf", wide, expected, "q4_k_m")
    kinds = {each.name: each.tensor_type.name for each in GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.3.attn_q.weight"] == "Q4_K"
    for part in ("attn_v", "ffn_down"):
        assert [kinds[f"blk.{layer}.{part}.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert checking.Facts(path).value("general.file_type") == LlamaFileType.MOSTLY_Q4_K_M
    k_quant, head = GGMLQuantizationType.Q5_K, "output.weight"
    assert k_quants.kind_of(head, k_quant, 4, is_tied=False) == GGMLQuantizationType.Q6_K
    assert k_quants.kind_of("token_embd.weight", k_quant, 4, is_tied=False) == k_quant
    assert [k_quants.fitting(kind, 576).name for kind in k_quants.K_QUANTS] == ["Q5_0", "Q5_0", "Q8_0"]
    assert k_quants.fitting(k_quant, 100) == GGMLQuantizationType.F16


def test_rounding_in_parts_is_rounding() -> None:
    """ggml's rounding to blocks that `gguf` can write too, and to others that it cannot, on one thread and three."""
    values = torch.randn(37, 512, generator=torch.Generator().manual_seed(0)).numpy()
    q5_1, q4_k = GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q4_K
    assert (k_quants.quantize(values, q5_1) == quants.quantize(values, q5_1)).all()
    one, three = (k_quants.quantize(values, q4_k, threads) for threads in (1, 3))
    assert (one == three).all()
    assert abs(quants.dequantize(one, q4_k) - values).mean() < 0.1


def test_k_quants_where_llama_cpp_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "q6_k" in exports.formats_here("gguf"), "xllamacpp is among what tests need"
    monkeypatch.setattr(exports, "find_spec", lambda package: None)
    assert "q6_k" not in exports.formats_here("gguf") and "q8_0" in exports.formats_here("ollama")
    with pytest.raises(StudioError, match="which is not installed"):
        exports.Choice("gguf", "q4_k_m").args()
    monkeypatch.setattr(k_quants, "find_spec", lambda package: None)
    k_quants._chunk_function.cache_clear()
    with pytest.raises(ModelError, match="No library of llama.cpp"):
        k_quants.quantize(torch.zeros(1, 256).numpy(), GGMLQuantizationType.Q4_K)


def test_ollama_creates_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "luna"
    folder.mkdir()
    (folder / "Modelfile").write_text("FROM ./luna.gguf\n")
    job = Job(tmp_path, export=str(folder), name="luna")
    (folder / "gate.json").write_text('{"passed": true}')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StudioError, match="not on the PATH"):
        ollama.run(job)
    script = f"#!{sys.executable}\nimport os, sys\nopen('called', 'w').write(repr((sys.argv[1:], os.listdir())))\n"
    on_path(monkeypatch, tmp_path / "bin", "ollama", script)
    assert ollama.run(job)["command"] == "ollama run luna"
    called = (folder / "called").read_text()
    assert called.startswith("(['create', 'luna', '-f', 'Modelfile']") and "'Modelfile'" in called
    (folder / "gate.json").write_text('{"passed": false, "message": "Failed"}')
    with pytest.raises(StudioError, match="failed its gate"):
        ollama.run(job)
    (folder / "gate.json").write_text('{"passed": true}')
    on_path(monkeypatch, tmp_path / "bin", "ollama", f"#!{sys.executable}\nimport sys\nsys.exit('Error: no server')\n")
    with pytest.raises(StudioError, match="Error: no server"):
        ollama.run(job)


@pytest.mark.usefixtures("few_probes")
def test_ollama_gets_its_modelfile(place: Path, tmp_path: Path) -> None:
    result = export_it(place, tmp_path / "luna", kind="ollama")
    assert result["passed"], result["message"]
    lines = (tmp_path / "luna" / "Modelfile").read_text()
    assert lines.startswith("FROM ./luna-f16.gguf\nTEMPLATE ") and 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 512" in lines and "<|im_start|>assistant\n{{ $later = true }}" in lines


@pytest.mark.usefixtures("few_probes")
def test_another_template_or_stop_in_the_modelfile_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GGUF file beside it is whole; what Ollama would write is read off the Modelfile itself."""
    whole = ollama.modelfile
    for number, (good, bad) in enumerate({"|>assistant": "|>model", "PARAMETER stop": "PARAMETER start"}.items()):
        monkeypatch.setattr(export, "modelfile", lambda *args, g=good, b=bad: whole(*args).replace(g, b))
        result = export_it(place, tmp_path / f"luna{number}", kind="ollama")
        assert not result["passed"] and bool(result["other_prompts"]) == (number == 0), result["message"]
        assert bool(result["lacking_ends"]) == (number == 1)
    monkeypatch.setattr(export, "modelfile", lambda *args: whole(*args).replace("$later", "$more"))
    with pytest.raises(DataError, match="not one of ours"):
        export_it(place, tmp_path / "odd", kind="ollama")


@pytest.mark.usefixtures("few_probes")
@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_chat_begins_as_in_training(tmp_path: Path, writes_bos: bool) -> None:
    """Whatever the tokenizer does to a text on its own: BOS twice, or where none was, would be another prompt."""
    base = make_model(
        tmp_path / "base", LlamaConfig(**SHAPE), template=("{{ bos_token }}" if writes_bos else "") + CHATML
    )
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(base / "tokenizer.json"))
    result = export_it(tmp_path, tmp_path / "luna", weights=str(base), kind="ollama")
    assert result["passed"], result["message"]
    assert checking.Facts(tmp_path / "luna" / "luna-f16.gguf").value("tokenizer.ggml.add_bos_token") == writes_bos
    assert "<s>" not in (tmp_path / "luna" / "Modelfile").read_text().partition("PARAMETER")[0]


def test_a_date_that_stands_still_is_told(place: Path, expected: Expected) -> None:
    dated = ChatTemplate("{{ strftime_now('%Y') }}" + CHATML, expected.template.special_tokens)
    told = ollama.modelfile("x.gguf", replace(expected, template=dated), False, place / "base", 512)
    assert told.startswith(ollama.DATE_STANDS + "\nFROM ./x.gguf\n")
    assert ollama.DATE_STANDS not in ollama.modelfile("x.gguf", expected, False, place / "base", 512)


def test_a_go_template_writes_what_jinja_writes(place: Path) -> None:
    refused = []
    for name in ["", *template_names()]:
        template = load_template(name, place / "base")
        try:
            found = go_template(template)
        except DataError:
            refused.append(name)
            continue
        chat = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "?"},
        ]
        assert found.render(chat) == template.render(chat, add_generation_prompt=True), name
        assert GoTemplate.read(found.source) == found, name
    assert refused == ["chatglm2"], "it numbers the rounds"


@pytest.mark.usefixtures("few_probes")
def test_an_adapter_bundle(place: Path, tmp_path: Path) -> None:
    result = export_it(place, tmp_path / "luna", kind="adapter")
    assert result["passed"] and result["figures"]["relative_error"] < 1e-6
    config = json.loads((tmp_path / "luna" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base", "no path of this machine"
    with zipfile.ZipFile(tmp_path / "luna" / "luna.zip") as archive:
        assert {"luna/adapter_model.safetensors", "luna/README.md", "luna/tokenizer.json"} <= set(archive.namelist())
    with pytest.raises(StudioError, match="whole model"):
        export_it(place, tmp_path / "x", kind="adapter", weights=str(place / "base"))


def test_weights_are_stored_as_they_are_named(place: Path, tmp_path: Path, expected: Expected) -> None:
    """Matrices in the format, vectors in float32; the values are the folded ones."""
    path = write(tmp_path / "x.gguf", place / "base", expected, "q8_0")
    kinds = {each.name: each.tensor_type.name for each in GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert "output.weight" not in kinds, "it is tied to the embedding"
    wanted = tensors_of(place / "base")["model.norm.weight"]
    (found,) = (each.data for each in GGUFReader(path).tensors if each.name == "output_norm.weight")
    assert torch.equal(torch.tensor(found.tolist()), wanted)
