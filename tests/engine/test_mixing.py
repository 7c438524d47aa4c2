"""Products for a few rows, and adapters side by side: the same numbers as the usual way."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from studio.engine import thin
from studio.engine.generate import wearing
from studio.engine.mixing import BASE_ADAPTER, SETTLED, RowAdapters
from studio.engine.models.load import LoadedModel

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [5, 6, 7, 8]])
NAMES = [BASE_ADAPTER, "a", "b", "c"]


def make_adapter(base: Path, folder: Path, seed: int, **options: object) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(lora_alpha=16, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("last", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
@torch.no_grad()
def test_each_row_is_computed_as_its_adapter_alone(
    tiny_model: Path, tmp_path: Path, last: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different ranks, on different layers, and one that is more than y = xW + xAB, or scaled otherwise."""
    folders = {
        "a": make_adapter(tiny_model, tmp_path / "a", 1, r=4, target_modules="all-linear"),
        "b": make_adapter(tiny_model, tmp_path / "b", 2, r=8, target_modules=["q_proj", "down_proj"]),
        "c": make_adapter(tiny_model, tmp_path / "c", 3, r=4, target_modules=["q_proj", "v_proj"], **last),
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model = base
    for name, folder in folders.items():
        if model is base:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
    model.eval()
    wanted = []
    for number, name in enumerate(NAMES):
        if name == BASE_ADAPTER:
            with model.disable_adapter():
                wanted.append(model(input_ids=IDS[number : number + 1]).logits)
        else:
            model.set_adapter(name)
            wanted.append(model(input_ids=IDS[number : number + 1]).logits)
    adapters = RowAdapters(model)
    adapters.send(NAMES)
    found = base(input_ids=IDS).logits
    assert torch.allclose(found, torch.cat(wanted), atol=1e-4)
    adapters.send(NAMES[:2])  # fewer of them, without laying the others anew
    assert torch.allclose(base(input_ids=IDS[:2]).logits, torch.cat(wanted[:2]), atol=1e-4)
    with pytest.raises(ValueError, match="nobody"):
        adapters.send(["nobody"])
    adapters.renew(model)
    stackings: list[Sequence[str]] = []
    stack = RowAdapters._stack

    def counting(self: RowAdapters, names: list[str]) -> None:
        stackings.append(names)
        stack(self, names)

    monkeypatch.setattr(RowAdapters, "_stack", counting)
    for number in (1, 2, 1, 2, 1):  # two batches that take turns are laid side by side once
        adapters.send(NAMES[number : number + 1])
        assert torch.allclose(base(input_ids=IDS[number : number + 1]).logits, wanted[number], atol=1e-4)
    for _ in range(SETTLED + 1):  # a batch that is there alone carries no other's adapter
        adapters.send(NAMES[1:2])
    assert stackings == [["a"], ["a", "b"], ["a"]]
    assert torch.allclose(base(input_ids=IDS[1:2]).logits, wanted[1], atol=1e-4)
    adapters.close()
    model.set_adapter("a")
    assert torch.allclose(model(input_ids=IDS[1:2]).logits, wanted[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 40])
@torch.no_grad()
def test_exchanged_factors_give_the_same_logits(
    load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int
) -> None:
    model = load_tiny(dtype=dtype).model.eval()
    ids = torch.arange(10, 10 + num_tokens).unsqueeze(0)
    before = model(input_ids=ids).logits
    monkeypatch.setattr(thin, "_is_faster", lambda weights: True)
    assert thin.thin_out(model)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert torch.allclose(model(input_ids=ids).logits, before, atol=tolerance)


def test_nothing_is_exchanged_where_it_is_not_faster(
    load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny().model
    monkeypatch.setattr(thin, "_is_faster", lambda weights: False)
    monkeypatch.setattr(thin, "_product", None)
    assert not thin.thin_out(model)
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@torch.no_grad()
def test_one_adapter_for_all_rows_is_computed_as_a_server_does(tiny_model: Path, tmp_path: Path, options: dict) -> None:
    """In bfloat16 as near to float32 as PEFT's own product; what is not plain stays PEFT's. Any batch will do."""
    folder = make_adapter(tiny_model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "down_proj"], **options)

    def put_on(dtype: torch.dtype) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
        return PeftModel.from_pretrained(base, str(folder), adapter_name="a").eval()

    true = put_on(torch.float32)(input_ids=IDS).logits
    model = put_on(torch.bfloat16)
    alone = model(input_ids=IDS).logits
    with wearing(model, "a"):
        worn, one = model(input_ids=IDS).logits, model(input_ids=IDS[:1]).logits
    assert (worn - true).norm() <= 1.1 * (alone - true).norm() < 0.1 * true.norm()
    assert torch.allclose(one, worn[:1], atol=0.05)
    assert torch.equal(model(input_ids=IDS).logits, alone)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@torch.inference_mode()
def test_a_mixture_of_experts_answers_with_one_adapter_at_a_time(kind: str) -> None:
    """Mixtral keeps its experts' weights as one, which PEFT wraps whole; the other has linear layers beside them."""
    model = mixture(kind)
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
    model.set_adapter("default")
    expected = model(input_ids=IDS).logits
    assert not torch.allclose(expected, plain, atol=0.1)
    adapters = RowAdapters(model)
    assert not adapters.can_mix
    for name, wanted in (("default", expected), (BASE_ADAPTER, plain), ("default", expected)):
        adapters.send([name] * len(IDS))
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-4)
    adapters.send([BASE_ADAPTER, *["default"] * (len(IDS) - 1)])
    with pytest.raises(ValueError, match="mixes the rows"):
        model(input_ids=IDS)
    adapters.close()
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)


@torch.inference_mode(False)
def mixture(kind: str) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts" if kind == "qwen2_moe" else "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes, **experts)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)
