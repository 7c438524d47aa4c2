"""Families that are Llama underneath: their logits against a reference in plain torch that reads their own weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.engine import convert, merge, relayout
from studio.engine.adapters import attach, load_adapter
from studio.engine.models.families import layout_of, native, native_pieces, read_native
from studio.engine.models.load import LoadedModel, load_base
from studio.errors import CheckpointError, ModelError
from tests.engine.folders import config_for, make_base, tensors_of
from tests.engine.test_convert import Job

TOKENIZERS = Path(__file__).parents[1] / "data/fixtures/old_tokenizers"
HEADS, WIDTH, HIDDEN, INNER, LAYERS, VOCABULARY = 4, 8, 32, 48, 2, 1900
IDS = torch.tensor([[1, 900, 37, 512, 44, 1203, 7, 7, 650]])
Shapes = dict[str, tuple[int, ...]]


def common(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "torch_dtype": "float32", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"}, **more,
    }  # fmt: skip


def internlm2() -> tuple[dict[str, Any], Shapes]:
    each = {
        "attention.wqkv": ((HEADS + 4) * WIDTH, HIDDEN), "attention.wo": (HIDDEN, HIDDEN),
        "feed_forward.w1": (INNER, HIDDEN), "feed_forward.w3": (INNER, HIDDEN), "feed_forward.w2": (HIDDEN, INNER),
        "attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    }  # fmt: skip
    shapes = {"model.tok_embeddings.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in each.items()}
    config = common("internlm2", num_key_value_heads=2, bias=False, rope_theta=1_000_000, hidden_act="silu")
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    return config, shapes | {"output.weight": (VOCABULARY, HIDDEN)}


def llama_names(fused: bool, biases: bool) -> Shapes:
    projections = ("W_pack",) if fused else ("q_proj", "k_proj", "v_proj")
    rows = 3 * HIDDEN if fused else HIDDEN
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        for name, size in [*((each, rows) for each in projections), ("o_proj", HIDDEN)]:
            shapes[f"model.layers.{n}.self_attn.{name}.weight"] = (size, HIDDEN)
            shapes |= {f"model.layers.{n}.self_attn.{name}.bias": (size,)} if biases else {}
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            shapes[f"model.layers.{n}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{name}.weight"] = (HIDDEN,)
    return shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def internlm() -> tuple[dict[str, Any], Shapes]:
    return common("internlm", bias=True, rotary={"type": "dynamic", "base": 10000}), llama_names(False, True)


def baichuan() -> tuple[dict[str, Any], Shapes]:
    return common("baichuan"), llama_names(True, False)


def baichuan2() -> tuple[dict[str, Any], Shapes]:
    return common("baichuan", z_loss_weight=0), llama_names(True, False)


def qwen() -> tuple[dict[str, Any], Shapes]:
    each = {
        "attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), "mlp.w1": (INNER, HIDDEN),
        "mlp.w2": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER), "ln_1": (HIDDEN,), "ln_2": (HIDDEN,),
    }  # fmt: skip
    shapes = {"transformer.wte.weight": (VOCABULARY, HIDDEN), "transformer.ln_f.weight": (HIDDEN,)}
    shapes |= {f"transformer.h.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in each.items()}
    shapes |= {f"transformer.h.{n}.attn.c_attn.bias": (3 * HIDDEN,) for n in range(LAYERS)}
    config = common("qwen", intermediate_size=2 * INNER, layer_norm_epsilon=1e-5, rotary_emb_base=10000, no_bias=True)
    config |= {"seq_length": 256, "kv_channels": WIDTH, "use_dynamic_ntk": True, "use_logn_attn": True}
    return config, shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def yi() -> tuple[dict[str, Any], Shapes]:
    """As it is published: a Llama by name too, whose tokenizer is a tokenizer.model."""
    shapes = llama_names(False, False)
    shapes |= {name: (2 * WIDTH, HIDDEN) for name in shapes if ".k_proj." in name or ".v_proj." in name}
    config = common("llama", num_key_value_heads=2, rope_theta=5_000_000.0)
    return {name: value for name, value in config.items() if name != "auto_map"}, shapes


def first_yi() -> tuple[dict[str, Any], Shapes]:
    """As it was first published, with code, and names of its own for the norms."""
    renamed = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    shapes = {re.sub("|".join(renamed), lambda m: renamed[m[0]], name): shape for name, shape in yi()[1].items()}
    return common("Yi", num_key_value_heads=2, rope_theta=5_000_000.0), shapes


FAMILIES = [internlm2, internlm, baichuan, baichuan2, qwen, first_yi]
Making = Callable[[], tuple[dict[str, Any], Shapes]]


def weights(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + ("norm" in name or "ln" in name)
        for name, shape in shapes.items()
    }


def make(folder: Path, family: Making, **changes: Any) -> Path:
    """A model folder as its makers publish it: their names, their tokenizer's file, their Python."""
    folder.mkdir(parents=True)
    config, shapes = family()
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(weights(shapes), folder / "model.safetensors", {"format": "pt"})
    (folder / "modeling.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\n")
    name = "qwen.tiktoken" if family is qwen else "tokenizer.model"
    (folder / name).write_bytes((TOKENIZERS / (name if family is qwen else "bpe.model")).read_bytes())
    talk = {
        "chat_template": "{% for m in messages %}<s>{{ m.content }}{% endfor %}",
        "auto_map": {"AutoTokenizer": ["t.T", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(talk | {"tokenizer_class": "OwnTokenizer"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


# The reference: a decoder in plain torch, written from the published architectures.


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions: the first half of each head is turned with the second. x: [heads, tokens, width]."""
    tokens, half = x.shape[1], x.shape[2] // 2
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(half) / half)[None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, theta: float) -> Tensor:
    """q: [tokens, heads, width], k and v with as many heads or fewer. Returns [tokens, heads * width]."""
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    q, k, v = turned(q.transpose(0, 1), theta), turned(k.transpose(0, 1), theta), v.transpose(0, 1)
    scores = q @ k.transpose(1, 2) / WIDTH**0.5
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1).reshape(q.shape[1], -1)


def heads_of(family: Making, w: dict[str, Tensor], n: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = len(x)
    if family is internlm2:  # for each of two key-value heads: its two query heads, its key, its value
        fused = (x @ w[f"model.layers.{n}.attention.wqkv.weight"].T).view(tokens, 2, 4, WIDTH)
        return fused[:, :, :2].reshape(tokens, HEADS, WIDTH), fused[:, :, 2], fused[:, :, 3]
    if family is internlm:
        at = f"model.layers.{n}.self_attn."
        parts = [x @ w[f"{at}{p}_proj.weight"].T + w[f"{at}{p}_proj.bias"] for p in "qkv"]
    elif family is qwen:
        at = f"transformer.h.{n}.attn.c_attn."
        parts = list((x @ w[f"{at}weight"].T + w[f"{at}bias"]).split(HIDDEN, -1))
    elif family in (yi, first_yi):
        parts = [x @ w[f"model.layers.{n}.self_attn.{p}_proj.weight"].T for p in "qkv"]
    else:
        parts = list((x @ w[f"model.layers.{n}.self_attn.W_pack.weight"].T).split(HIDDEN, -1))
    q, k, v = (part.view(tokens, -1, WIDTH) for part in parts)
    return q, k, v


def names(family: Making) -> dict[str, str]:
    if family is internlm2:
        return {
            "embed": "model.tok_embeddings", "last": "model.norm", "head": "output", "layer": "model.layers.",
            "o": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
            "before": "attention_norm", "between": "ffn_norm",
        }  # fmt: skip
    if family is qwen:
        return {
            "embed": "transformer.wte", "last": "transformer.ln_f", "head": "lm_head", "layer": "transformer.h.",
            "o": "attn.c_proj", "gate": "mlp.w2", "up": "mlp.w1", "down": "mlp.c_proj", "before": "ln_1",
            "between": "ln_2",
        }  # fmt: skip
    before, between = ("ln1", "ln2") if family is first_yi else ("input_layernorm", "post_attention_layernorm")
    return {
        "embed": "model.embed_tokens", "last": "model.norm", "head": "lm_head", "layer": "model.layers.",
        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "before": before, "between": between,
    }  # fmt: skip


def reference(family: Making, w: dict[str, Tensor], ids: Tensor) -> Tensor:
    called = names(family)
    x = w[f"{called['embed']}.weight"][ids]
    theta = {internlm2: 1e6, yi: 5e6, first_yi: 5e6}.get(family, 1e4)
    for n in range(LAYERS):
        at = f"{called['layer']}{n}."
        seen = attention(*heads_of(family, w, n, norm(x, w[f"{at}{called['before']}.weight"])), theta)
        bias = w.get(f"{at}{called['o']}.bias", torch.zeros(HIDDEN))
        x = x + seen @ w[f"{at}{called['o']}.weight"].T + bias
        inner = norm(x, w[f"{at}{called['between']}.weight"])
        gate, up = (inner @ w[f"{at}{called[name]}.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}{called['down']}.weight"].T
    head = w[f"{called['head']}.weight"]
    if family is baichuan2:
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, w[f"{called['last']}.weight"]) @ head.T


def loaded(folder: Path) -> LoadedModel:
    return load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[0]


@pytest.mark.parametrize("family", [*FAMILIES, yi], ids=lambda each: each.__name__)
def test_logits_are_those_of_the_published_architecture(tmp_path: Path, family: Making) -> None:
    folder = make(tmp_path / "m", family)
    found = loaded(folder)
    expected = reference(family, weights(family()[1]), IDS[0])
    assert torch.allclose(logits(found.model), expected, atol=2e-4, rtol=1e-4), (
        (logits(found.model) - expected).abs().max()
    )
    assert type(found.model).__name__ in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    assert not (folder / "canary").exists()
    assert found.tokenizer.decode(found.tokenizer.encode("Hello, world!")) == "Hello, world!"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.__name__)
def test_weights_that_are_asked_for_one_by_one_are_those_read_at_once(tmp_path: Path, family: Making) -> None:
    folder = make(tmp_path / "base", family)
    found = native(folder)
    pieces, whole = (read(folder, found, torch.bfloat16) for read in (native_pieces, read_native))
    assert list(pieces) == list(whole) and not any(isinstance(each, Tensor) for each in pieces.values())
    assert all(pieces[name][...].dtype == torch.bfloat16 for name in whole)
    assert all(torch.allclose(pieces[name][...], tensor, rtol=1e-2) for name, tensor in whole.items())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.__name__)
def test_the_way_back_gives_every_weight_its_name_and_bits(tmp_path: Path, family: Making) -> None:
    found = native(make(tmp_path / "m", family))
    assert found
    own = weights(family()[1])
    back = found.own_state(found.state(own.items()))
    assert back.keys() == own.keys()
    exact = {name for name in own if family is not baichuan2 or name != "lm_head.weight"}
    assert all(torch.equal(back[name], own[name]) for name in exact)


@pytest.mark.parametrize("family", [internlm2, qwen], ids=lambda each: each.__name__)
def test_an_adapter_in_the_familys_own_layout_is_loaded_merged_and_leaves_as_a_llama(
    tmp_path: Path, family: Making
) -> None:
    """XTuner trains on wqkv; here q, k and v each get the same A and their rows of B."""
    base = make(tmp_path / "m", family)
    adapter = own_adapter(tmp_path / "adapter", family)
    before = loaded(base)
    plain = logits(before.model)
    model = load_adapter(before.model, adapter, "one")
    own, delta = weights(family()[1]), deltas(adapter)
    expected = reference(family, own | {name: own[name] + change for name, change in delta.items()}, IDS[0])
    assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
    merge.run(Job(tmp_path, base=str(base), adapter=str(adapter), out=str(tmp_path / "merged"), device="cpu"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=False)
    assert torch.allclose(logits(merged), expected, atol=2e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged", trust_remote_code=False)
    assert tokenizer("Hello", add_special_tokens=False).input_ids == before.tokenizer.encode("Hello")
    assert not list((tmp_path / "merged").glob("*.py"))


def own_adapter(folder: Path, family: Making) -> Path:
    """A LoRA adapter as PEFT writes it for the family's own class."""
    generator = torch.Generator().manual_seed(9)
    linear = [n for n, s in family()[1].items() if len(s) == 2 and n.startswith(names(family)["layer"])]
    tensors = {}
    for name in linear:
        rows, columns = family()[1][name]
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in linear})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM").to_dict()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}, default=str))
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    found = tensors_of(folder)
    return {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): 2.0
        * found[name.replace("_A.", "_B.")]
        @ a
        for name, a in found.items()
        if ".lora_A." in name
    }


def test_training_takes_layers_by_either_name(tmp_path: Path) -> None:
    found = loaded(make(tmp_path / "m", internlm2))
    config = config_for(tmp_path / "m")
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"target_modules": "wqkv,w1"})})
    trained = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, p in attach(found, config).named_parameters()
        if p.requires_grad
    }
    assert trained == {"q_proj", "k_proj", "v_proj", "gate_proj"}


def test_full_weights_of_xtuner_in_the_familys_layout_become_a_llama(tmp_path: Path) -> None:
    base = make(tmp_path / "m", internlm2)
    own = {name: tensor * 1.1 for name, tensor in weights(internlm2()[1]).items()}
    torch.save({"state_dict": {f"llm.{name}": tensor for name, tensor in own.items()}}, tmp_path / "iter_9.pth")
    convert.run(Job(tmp_path, pth=str(tmp_path / "iter_9.pth"), out=str(tmp_path / "out"), base=str(base), fp32=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert torch.allclose(logits(model), reference(internlm2, own, IDS[0]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.__name__)
def test_a_model_is_written_in_either_layout(tmp_path: Path, family: Making) -> None:
    own = make(tmp_path / "own", family)
    relayout.run(Job(tmp_path, source=str(own), out=str(tmp_path / "llama"), own=""))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", trust_remote_code=False)
    expected = reference(family, weights(family()[1]), IDS[0])
    assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)
    assert "auto_map" not in (tmp_path / "llama/tokenizer_config.json").read_text()
    if family is internlm:  # its names are Llama's
        return
    relayout.run(Job(tmp_path, source=str(tmp_path / "llama"), out=str(tmp_path / "back"), own=str(own)))
    stored, back = weights(family()[1]), tensors_of(tmp_path / "back")
    exact = [name for name in stored if family is not baichuan2 or name != "lm_head.weight"]
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in exact)
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == family()[0]["model_type"]
    assert (tmp_path / "back/modeling.py").read_bytes() == (own / "modeling.py").read_bytes()
    assert not list(tmp_path.rglob("canary"))


def test_layouts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain")
    with pytest.raises(ModelError, match="layout"):
        relayout.run(Job(tmp_path, source=str(plain), out=str(tmp_path / "a"), own=""))
    with pytest.raises(ModelError, match="layout"):
        relayout.run(Job(tmp_path, source=str(plain), out=str(tmp_path / "b"), own=str(plain)))


def test_what_is_no_such_family_and_what_does_not_fit(tmp_path: Path) -> None:
    alibi = make(tmp_path / "alibi", baichuan)
    config = json.loads((alibi / "config.json").read_text())
    del config["max_position_embeddings"]
    (alibi / "config.json").write_text(json.dumps(config))
    assert native(alibi) is None
    with pytest.raises(ModelError, match="code"):
        loaded(alibi)
    with pytest.raises(ModelError, match="rows"):
        loaded(make(tmp_path / "heads", internlm2, num_key_value_heads=4))
    with pytest.raises(ModelError, match="does not say"):
        native(_without(tmp_path, "hidden_size"))
    found = native(make(tmp_path / "back", internlm2))
    assert found and layout_of(torch.nn.Linear(1, 1)) is None
    adapter = get_peft_model(loaded(tmp_path / "back").model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="own layout"):
        found.own_state({n: p for n, p in adapter.named_parameters() if "lora_" in n})


def _without(tmp_path: Path, name: str) -> Path:
    folder = make(tmp_path / "short", internlm2)
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
