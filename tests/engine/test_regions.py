"""Layers of full training, compiled one by one, compute what they did; where that cannot be, they stay as they were."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.config.schema import RunConfig
from studio.engine import regions
from studio.engine.models.load import LoadedModel
from tests.engine.test_loop import encode, make_trainer, step_gradients

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_regions_train_as_plain_ones_do(load_tiny: Load, tiny_config: Make) -> None:
    """On rows of several lengths; Inductor's C++ stands for what it makes for a GPU."""
    found = []
    for is_compiled in (False, True):
        loaded = load_tiny()
        trainer = make_trainer(loaded, tiny_config(method="full"))
        layers = regions.own_layers(loaded.model)
        assert len(layers) == loaded.model.config.num_hidden_layers
        if is_compiled:
            assert trainer.forward.compile_regions() == ""
            assert all(layer._compiled_call_impl is not None for layer in layers)
        examples = encode(loaded)
        found.append([step_gradients(trainer, examples[:number]) for number in (3, 7, 12)])
    for (loss, gradients), (other_loss, others) in zip(*found, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for one, other in zip(gradients, others, strict=True):
            assert (one - other).norm() <= 1e-3 * max(1e-3, float(one.norm()))


def test_fused_layers_are_no_regions(load_tiny: Load, tiny_config: Make) -> None:
    trainer = make_trainer(load_tiny(), tiny_config(method="lora"))
    assert regions.own_layers(trainer.model) == [] and trainer.forward.compile_regions() == ""


def test_layers_that_are_computed_again_stay_as_they_are(load_tiny: Load, tiny_config: Make) -> None:
    trainer = make_trainer(load_tiny(), tiny_config(method="full", **{"train.gradient_checkpointing": True}))
    assert "computed again" in trainer.forward.compile_regions()


@pytest.mark.parametrize(
    ("fails_when", "told"),
    [
        ("compiled", "no compiler was found"),
        ("evaluated", "no compiler was found"),
        ("never", "compiled layers computed something else"),
    ],
)
def test_a_compiler_that_fails_or_errs_leaves_layers_as_they_were(
    load_tiny: Load, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, fails_when: str, told: str
) -> None:
    def compile_badly(run: Any, **_: object) -> Callable[..., torch.Tensor]:
        def compiled(*args: Any, **kwargs: Any) -> torch.Tensor:
            if fails_when == "evaluated" and not run.__self__.training:
                raise RuntimeError("no compiler was found\nmore")
            return 2 * run(*args, **kwargs)

        if fails_when == "compiled":
            raise RuntimeError("no compiler was found\nmore")
        return compiled

    monkeypatch.setattr(torch, "compile", compile_badly)
    trainer = make_trainer(load_tiny(), tiny_config(method="full"))
    assert trainer.forward.compile_regions() == told
    assert all(each._compiled_call_impl is None for each in regions.own_layers(trainer.model))
    assert all(each.training for each in trainer.model.modules())
