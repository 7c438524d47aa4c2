"""The same on a GPU, where one is at hand: what other tests hold against stand-ins is held here against the device."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from studio.config.schema import RunConfig
from studio.engine.adapters import trainable_parameters
from studio.engine.attention import Masked, make_layout
from studio.engine.models.load import LoadedModel
from tests.engine.test_attention import attended, chains
from tests.engine.test_loop import encode, make_trainer

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]
GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def load_for(load_tiny: Load, method: str) -> LoadedModel:
    return load_tiny(device=GPU, dtype=torch.float32 if method == "full" else torch.bfloat16)


@pytest.mark.parametrize("kind", ["varlen", "flex", "flash_attention_2"])
@pytest.mark.parametrize("fixed", [False, True])
def test_kernels_equal_float32_sdpa(kind: str, fixed: bool) -> None:
    if kind == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    ends = np.concatenate([np.full(70, 700), chains(200, 300, 130) + 70, [764] * 64])
    chance = torch.Generator().manual_seed(0)
    row = [torch.randn(heads, len(ends), 64, generator=chance).to(GPU, torch.bfloat16) for heads in (6, 2, 2)]
    found = attended(make_layout(kind, ends, GPU, fixed), [each.requires_grad_() for each in row])
    expected = attended(Masked(ends, GPU), [each.detach().float().requires_grad_() for each in row])
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flex"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_replays_are_proven_and_train_alike(
    load_tiny: Load, tiny_config: Make, capsys: pytest.CaptureFixture[str], method: str, attention: str
) -> None:
    """`on` raises where a replay has another gradient, or cannot be recorded."""
    weights, losses = [], []
    for graph in ("off", "on"):
        settings = {
            "method": method,
            "model.attention": attention,
            "model.dtype": "bfloat16",
            "train.cuda_graph": graph,
        }
        trainer = make_trainer(load_for(load_tiny, method), tiny_config(**settings), torch.bfloat16)
        rows = encode(load_tiny(), 24)
        losses.append([trainer.step(rows[4 * (step % 6) :][:4], step + 1).loss for step in range(12)])
        weights.append(torch.cat([each.detach().flatten() for each in trainable_parameters(trainer.model)]))
    assert "CUDA graph: replayed" in capsys.readouterr().out
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert (weights[1] - weights[0]).norm() <= 2e-2 * weights[0].norm()


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_kernels_of_liger_are_right(
    load_tiny: Load, tiny_config: Make, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    make_trainer(load_for(load_tiny, method), tiny_config(method=method), torch.bfloat16)
    said = capsys.readouterr().out
    assert "Liger kernels: rotary positions" in said and "differs" not in said and "failed" not in said
