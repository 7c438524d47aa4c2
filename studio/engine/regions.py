"""Decoder layers that run an architecture's own code, each compiled by torch.compile as one region.

One region a layer and not the whole model: layers are alike, so all share what is compiled for the first. Attention,
which is of another shape for every row, stays outside.
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def own_layers(model: nn.Module) -> list[nn.Module]:
    """Its decoder layers of whose parts none has been replaced by code of ours."""
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    return [each for each in layers if not any("forward" in vars(part) for part in each.modules())]


def use(layers: list[nn.Module], results: Callable[[], list[Tensor]], are_close: Callable[..., bool]) -> str:
    """Compile these layers for any number of tokens; why they stay as they are when it cannot be, else "".

    `results`: some of what the model computes with them, gradients among it; compiled, they must be close to those.
    """
    expected = results()
    try:
        for layer in layers:
            layer.compile(dynamic=True)
        why = "" if are_close(results(), expected) else "compiled layers computed something else"
    except Exception as error:  # a compiler that is missing or fails, in whatever way
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if why:
        leave(layers)
    return why


def leave(layers: list[nn.Module]) -> None:
    """They run as they are written again."""
    for layer in layers:
        layer._compiled_call_impl = None
