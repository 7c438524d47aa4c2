"""Tensors of a file against those that it should hold: rounding passes in every format, a small damage in none."""

import math

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from studio.engine.equality import agreement
from studio.engine.weighing import ALLOWED, Read, weigh

# Of the k-quants the `gguf` package reads all and writes none; blocks of as many bits stand for them.
WRITTEN_AS = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q8_0", "q5_k_m": "Q5_0", "q4_k_m": "Q4_0"
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Tensor:
    return torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def change() -> Tensor:
    """An adapter of small effect: 1 % of the weights."""
    return 0.01 * torch.randn(1024, 256, generator=torch.Generator().manual_seed(1))


def rounded(values: Tensor, form: str) -> Tensor:
    kind = GGMLQuantizationType[WRITTEN_AS[form]]
    return torch.from_numpy(quants.dequantize(quants.quantize(values.numpy(), kind), kind).copy()).reshape(values.shape)


@pytest.mark.parametrize("form", ALLOWED)
def test_rounding_passes_and_damage_does_not(form: str, base: Tensor, change: Tensor) -> None:
    good = base + change
    files = {
        "rounded": good, "too large": 1.02 * good, "too small": 0.98 * good, "no adapter": base,
        "adapter twice": good + change, "adapter reversed": base - change,
    }  # fmt: skip
    found = {
        name: weigh([Read("a.weight", rounded(values, form), good, base)], ALLOWED[form])
        for name, values in files.items()
    }
    assert [name for name, each in found.items() if each.passed] == ["rounded"], found
    share = found["rounded"].adapter_share
    assert share == pytest.approx(1, abs=0.05)
    assert found["no adapter"].adapter_share == pytest.approx(0, abs=0.05)
    assert "scaled by 1.0" in found["too large"].message


def test_one_tensor_among_many(base: Tensor) -> None:
    others = [Read(f"{number}.weight", base, base) for number in range(3)]
    zeros, nans = torch.zeros_like(base), torch.full_like(base, math.nan)
    assert weigh([*others, Read("norm", zeros, zeros)], ALLOWED["q8_0"]).passed
    for damaged, wanted in ((zeros, base), (nans, base), (base, zeros), (base.flip(0), base)):
        found = weigh([*others, Read("x.weight", damaged, wanted)], ALLOWED["q8_0"])
        assert not found.passed and found.error_of == "x.weight"


def test_near_ties_are_those_of_the_reference() -> None:
    """Noise as of 8 bits may flip what was nearly equal; where the reference was sure, another answer fails."""
    torch.manual_seed(0)
    sure = torch.randn(200, 500)
    sure[:, 7] += 12.0
    tied = sure.clone()
    tied[:, 8] = tied[:, 7] + 0.01
    noise = 0.05 * sure.std() * torch.randn(200, 500)
    found = agreement([sure + noise, tied + noise], [sure, tied], 0.1)
    assert found.verified and (found.same_answers, found.near_ties) == (1, 1)
    other = sure + noise
    other[3, 9] = other[3, 7] + 1.0
    found = agreement([other, tied + noise], [sure, tied], 0.1)
    assert found.relative_error < 0.1 and not found.verified
