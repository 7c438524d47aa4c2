"""Fused layers give what PEFT and transformers give, in both directions, and leave alone what has more to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from studio.config.schema import RunConfig
from studio.engine import adapters, parts
from studio.engine.fused import PROBE_TOKENS, FusedLayer, fuse, unfuse
from studio.engine.models.load import LoadedModel
from studio.engine.parts import GatedMlp

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]


class Pair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["first", "second"], **settings}
    model = get_peft_model(Pair(), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return [out, x.grad, *(each.grad for each in model.parameters() if each.requires_grad)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((one.float() - other.float()).norm() <= tolerance * other.float().norm() for one, other in pairs)


def test_lora_layers_are_those_of_peft() -> None:
    model, x = pair(), torch.randn(2, 5, 24)
    expected = results(model, x)
    assert fuse(model) == 0
    assert close(results(model, x), expected, 1e-5)
    with model.disable_adapter():
        assert torch.allclose(model(x), model.get_base_model()(x)) and not torch.allclose(model(x), expected[0])


def test_scaling_by_the_root_of_the_rank_is_kept() -> None:
    model, x = pair(use_rslora=True), torch.randn(7, 24)
    expected = results(model, x)
    assert fuse(model) == 0 and close(results(model, x), expected, 1e-5)


def test_bfloat16_weights_learn_in_float32() -> None:
    wide, narrow = pair(), pair()
    for layer in (narrow.get_base_model().first, narrow.get_base_model().second):
        layer.base_layer.to(torch.bfloat16)
    x = torch.randn(64, 24)
    expected = results(wide, x)
    assert fuse(narrow) == 0
    found = results(narrow, x.bfloat16())
    assert close(found, expected, 0.03)
    learned = [each for each in narrow.parameters() if each.requires_grad]
    assert all(each.dtype == each.grad.dtype == torch.float32 for each in learned)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_with_more_to_them_stay(settings: dict[str, object]) -> None:
    model = pair(**settings)
    before = {name: module.forward.__func__ for name, module in model.named_modules()}
    assert fuse(model) == 2
    assert all(module.forward.__func__ is before[name] for name, module in model.named_modules())


def gated_mlp(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2, **settings)
    names = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(LlamaMLP(config), LoraConfig(r=4, lora_alpha=12, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gated_mlp_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Two threads compute narrow results in pieces."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(parts, "SHARED_ROWS", 4)
    model, x = gated_mlp(), torch.randn(2, 5, 24)
    expected = results(model, x)
    assert fuse(model) == 0
    mlp = model.get_base_model()
    assert isinstance(mlp.forward.__self__.part, GatedMlp)
    assert close(results(model, x), expected, 1e-5)
    with model.disable_adapter():
        assert torch.allclose(model(x), LlamaMLP.forward(mlp, x)) and not torch.allclose(model(x), expected[0])


def test_biases_of_a_gated_mlp_count() -> None:
    model, x = gated_mlp(mlp_bias=True), torch.randn(2, 5, 24)
    expected = results(model, x)
    assert fuse(model) == 0 and model.get_base_model().forward.__func__ is not LlamaMLP.forward
    assert close(results(model, x), expected, 1e-5)


def test_an_mlp_with_another_gate_stays() -> None:
    model, x = gated_mlp(hidden_act="gelu"), torch.randn(2, 5, 24)
    expected = results(model, x)
    assert fuse(model) == 0 and model.get_base_model().forward.__func__ is LlamaMLP.forward
    assert close(results(model, x), expected, 1e-5)


def decoder(kind: str, **settings: object) -> nn.Module:
    """A tiny model of an architecture with a LoRA adapter on all its layers, told to learn."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=3, pad_token_id=0, **sizes | settings)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def of_tokens(model: nn.Module) -> list[Tensor]:
    """Logits of two rows, and what their sum leaves where something learns."""
    model.zero_grad()
    logits = model(input_ids=torch.arange(1, 23).view(2, 11), use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return [logits, *(each.grad for each in adapters.trainable_parameters(model))]


def layers_of(model: nn.Module) -> nn.ModuleList:
    return adapters.core_of(model).get_decoder().layers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_decoder_layer_is_that_of_transformers(kind: str) -> None:
    """Qwen2's query, key and value have biases."""
    model = decoder(kind)
    expected = of_tokens(model)
    assert fuse(model) == 0
    assert all(isinstance(layer.forward.__self__, FusedLayer) for layer in layers_of(model))
    assert close(of_tokens(model), expected, 1e-4)
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=torch.arange(1, 12)[None]).logits
        unfuse(model)
        assert torch.allclose(model(input_ids=torch.arange(1, 12)[None]).logits, plain, atol=1e-5)


def test_a_layer_that_turns_its_heads_the_other_way_stays() -> None:
    """A small model's attention hardly shows it, so it is not asked what it makes of its heads."""

    class OtherAttention(LlamaAttention):
        def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, position_embeddings=(cos, -sin), **kwargs)

    model = decoder("llama")
    for layer in layers_of(model):
        layer.self_attn.__class__ = OtherAttention
    expected = of_tokens(model)
    fuse(model)
    assert all(layer.forward.__func__ is type(layer).forward for layer in layers_of(model))
    assert close(of_tokens(model), expected, 1e-4)


def test_a_layer_that_fails_on_what_it_is_tried_with_stays() -> None:
    """In whatever way: a model's own code may look up what only its model gives it."""

    class OtherAttention(LlamaAttention):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states + hidden_states[:, PROBE_TOKENS, None], **kwargs)

    model = decoder("llama")
    for layer in layers_of(model):
        layer.self_attn.__class__ = OtherAttention
    expected = of_tokens(model)
    assert fuse(model) == 0
    assert all(layer.forward.__func__ is type(layer).forward for layer in layers_of(model))
    assert close(of_tokens(model), expected, 1e-4)


def test_a_decoder_layer_is_computed_again_where_memory_is_saved() -> None:
    model = decoder("llama")
    expected = of_tokens(model)
    fuse(model)
    core = adapters.core_of(model)
    core.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        assert close(of_tokens(model), expected, 1e-4)
    within = {each.shape[-1] for each in saved if each.ndim == 2}
    assert 40 not in within and 80 not in within  # the width of the MLP


def test_a_layer_with_a_cache_of_keys_is_computed_by_its_own_code() -> None:
    model = decoder("llama").eval()
    fuse(model)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        begun = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=begun.past_key_values).logits
    assert torch.allclose(torch.cat([begun.logits, rest], 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_other_layers_are_fused_in_parts(kind: str) -> None:
    """Their heads are normed, or their norms come after."""
    model = decoder(kind, head_dim=6)
    expected = of_tokens(model)
    assert fuse(model) == 0
    assert all(layer.forward.__func__ is type(layer).forward for layer in layers_of(model))
    assert all(isinstance(layer.mlp.forward.__self__.part, GatedMlp) for layer in layers_of(model))
    assert close(of_tokens(model), expected, 1e-4)


def test_four_bit_layers_learn_the_same(load_tiny: Load, tiny_config: Make) -> None:
    loaded = load_tiny(bits=4)
    model = adapters.attach(loaded, tiny_config(method="qlora")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(5, 45)[None]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        return [logits, *(each.grad for each in adapters.trainable_parameters(model))]

    expected = gradients()
    assert fuse(model) == 0
    assert close(gradients(), expected, 1e-4)


def test_a_frozen_norm_is_fused_and_one_that_learns_is_not() -> None:
    norm = LlamaRMSNorm(32, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 9, 32, requires_grad=True)
    weights = torch.randn(3, 9, 32)
    expected = norm(x)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    fuse(norm)
    assert norm.forward.__func__ is LlamaRMSNorm.forward
    norm.requires_grad_(False)
    fuse(norm)
    assert norm.forward.__func__ is not LlamaRMSNorm.forward
    found = norm(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad((found * weights).sum(), x)[0], gradient, atol=1e-5)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class CentredRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * (1 + self.weight)

    norm = CentredRMSNorm(32).requires_grad_(False)
    fuse(norm)
    assert norm.forward.__func__ is CentredRMSNorm.forward
