"""Layers that read the same input are one product, and each says what it says alone."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from studio.engine import thin
from studio.engine.joint import Worn, joint_of, same_input
from studio.engine.models.load import LoadedModel


def linear_layers(model: nn.Module) -> dict[nn.Linear, str]:
    return {module: name for name, module in model.named_modules() if type(module) is nn.Linear}


def test_layers_with_the_same_input_are_found_by_reading_a_token(load_tiny: Callable[..., LoadedModel]) -> None:
    model = load_tiny().model
    names = linear_layers(model)
    groups = {frozenset(names[layer].split(".")[-1] for layer in group) for group in same_input(model, list(names))}
    assert groups == {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"o_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
        frozenset({"lm_head"}),
    }


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("exchanged", [True, False])
@torch.no_grad()
def test_each_layer_says_what_it_says_alone_in_any_order(
    load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, num_rows: int, exchanged: bool
) -> None:
    model = load_tiny().model
    attention = model.model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    for layer in layers:
        layer.bias = nn.Parameter(torch.randn(layer.out_features))
    torch.manual_seed(0)
    x = torch.randn(num_rows, 1, layers[0].in_features)
    wanted = [layer(x) for layer in layers]
    monkeypatch.setattr(thin, "_is_faster", lambda weights: exchanged)
    thin.thin_out(model)
    joint, _ = joint_of(layers[0]) or (None, 0)
    assert joint is not None and all((joint_of(layer) or (None, 0))[0] is joint for layer in layers)
    for number in (0, 1, 2, 2, 1, 0, 0, 0):
        said = layers[number](x)
        assert torch.allclose(said, wanted[number], atol=1e-5)
        said.zero_()  # a reader may change what it got, and asks anew
    other = torch.randn_like(x)
    assert torch.allclose(layers[1](other), nn.functional.linear(other, layers[1].weight, layers[1].bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3])
@torch.no_grad()
def test_rows_that_wear_an_adapter_get_what_it_adds_and_the_others_nothing(
    load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int
) -> None:
    model = load_tiny().model.to(dtype)
    monkeypatch.setattr(thin, "_is_faster", lambda weights: True)
    thin.thin_out(model)
    attention = model.model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    joint, _ = joint_of(layers[0]) or (None, 0)
    assert joint is not None
    torch.manual_seed(0)
    wide = layers[0].in_features
    down = torch.randn(3 * 2, wide).to(dtype).float() / wide
    ups = [torch.randn(2, layer.out_features) for layer in layers]
    joint.lay(down, ups)
    gate = torch.tensor([[1.0, 0.0] * 3, [0.0, 0.0] * 3, [0.0, 1.0] * 3])
    x = torch.randn(5, num_tokens, wide).to(dtype)
    worn = {
        None: torch.zeros(5, 6),
        Worn(): torch.ones(5, 6),
        Worn(1, 3, 5): torch.tensor([[0.0], [1.0], [1.0], [0.0], [0.0]]).expand(5, 6),
        Worn(2, 5, 5, gate): torch.cat([torch.zeros(2, 6), gate]),
    }
    kept = []
    for each, whole_gate in worn.items():
        joint.send(each)
        for number, layer in enumerate(layers):
            narrow = (x.float() @ down.T).to(dtype).float() * whole_gate.unsqueeze(1)
            plain = (x.float() @ layer.weight.float().T).to(dtype).float()
            wanted = plain + narrow[..., 2 * number : 2 * number + 2] @ ups[number]
            kept.append((layer(x), wanted))
    for said, wanted in kept:  # at the end: what a layer said is not written over by those that speak after it
        assert said.dtype == dtype
        assert torch.allclose(said.float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.06)
    joint.send(Worn(0, 1, 4))
    with pytest.raises(ValueError, match="mixes the rows"):
        layers[0](x)
