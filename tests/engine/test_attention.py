"""Every kind of attention over a row sees what the layout says, and has the gradient of float32 SDPA with a mask."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from studio.data.packing import Ints, grow_tree
from studio.data.tokens import Example
from studio.engine import attention, blocks
from studio.engine.attention import Chains, Layout, Masked
from studio.engine.blocks import Blocks, cut, hidden_from

CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> Ints:
    """`ends` of one or more trees in a row."""
    forest, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=30), min_size=1, max_size=8))
        tree = grow_tree([Example(each, each) for each in sorted(ids)])
        forest.append(tree.ends + start)
        start += len(tree)
    return np.concatenate(forest)


def chains(*lengths: int) -> Ints:
    """Examples that share nothing, one after another."""
    return np.repeat(np.cumsum(lengths), lengths)


@settings(deadline=None)
@given(rows(), st.integers(1, 40), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 40)))
def test_blocks_hold_every_token_once_and_see_what_they_should(
    ends: Ints, whole: int, chain: int, long_chain: int | None
) -> None:
    seen, held = torch.zeros(len(ends), len(ends), dtype=torch.bool), np.zeros(len(ends), int)
    for block in cut(ends, whole, chain, long_chain):
        held[block.start : block.end] += 1
        for start, end in block.before:
            seen[block.start : block.end, start:end] = True
        own = ~hidden_from(ends, block.start, block.end)
        seen[block.start : block.end, block.start : block.end] = own
        assert not block.chain or own.equal(torch.ones_like(own).tril())
        assert block.num_keys == sum(end - start for start, end in block.key_ranges)
        assert block.size <= max(whole, chain) or long_chain is not None and block.size > long_chain
    assert (held == 1).all()
    assert seen.equal(~hidden_from(ends, 0, len(ends)))


def varlen_in_plain_words(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int, most: int, scaling: float
) -> Tensor:
    """What `varlen_attn` and flash-attn document: each sequence apart, causal from its last key backwards."""
    out = torch.empty_like(query)
    for (start, end), (first, last) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        assert end - start <= longest and last - first <= most
        mask = torch.ones(end - start, last - first, dtype=torch.bool).tril(int(last - first - (end - start)))
        parts = [each.transpose(0, 1)[None] for each in (query[start:end], key[first:last], value[first:last])]
        out[start:end] = functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scaling, enable_gqa=True
        )[0].transpose(0, 1)
    return out


def states(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Query of 6 heads, key and value of 2."""
    generator = torch.Generator().manual_seed(num_tokens)
    made = [torch.randn(heads, num_tokens, 16, generator=generator).to(dtype) for heads in (6, 2, 2)]
    return [each.requires_grad_() for each in made]


def attended(layout: Layout, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    out = layout.attend(*inputs, scaling=0.25)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def check(layout: Layout, ends: Ints, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    inputs = states(len(ends), dtype)
    expected = attended(Masked(ends, CPU), [each.detach().float().requires_grad_() for each in inputs])
    for found, wanted in zip(attended(layout, inputs), expected, strict=True):
        assert (found.float() - wanted).detach().norm() <= tolerance * max(1.0, float(wanted.detach().norm()))


@settings(deadline=None, max_examples=40)
@given(rows())
def test_each_kind_of_attention_equals_float32_sdpa(ends: Ints) -> None:
    check(Blocks(ends), ends)
    check(Chains(ends, CPU, varlen_in_plain_words), ends)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [(300,), (40, 700, 3), (1500, 20, 1100), (2, 1)], ids=str)
def test_long_and_short_examples(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    ends = chains(*lengths)
    check(Blocks(ends), ends, dtype, tolerance)


def test_scores_of_hundreds_are_not_rounded() -> None:
    """As trained models have them; in bfloat16 their differences would be gone."""
    ends = chains(60, 30)
    query, key, value = (each.detach() for each in states(len(ends), torch.bfloat16))
    query, key = query * 8 + 30, key * 8 + 30
    found = Blocks(ends).attend(query, key, value, 0.25)
    expected = Masked(ends, CPU).attend(query.float(), key.float(), value.float(), 0.25)
    assert (found.float() - expected).norm() <= 1e-2 * expected.norm()


def test_probabilities_may_be_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = chains(200, 90)
    monkeypatch.setattr(blocks, "KEPT_KEYS", 0)
    check(Blocks(ends), ends)


def test_a_cpu_computes_blocks_and_others_what_they_have() -> None:
    class Config:
        attention_dropout = 0.0
        sliding_window: int | None = None

    def kinds(name: str, device: str = "cpu", **values: object) -> list[str]:
        config = type("Config", (Config,), values)
        found = attention.choices(name, config, 512, torch.float32, torch.device(device))
        return [kind for kind, why in found if why]

    assert kinds("auto") == ["blocks", "sdpa"]
    assert kinds("sdpa") == ["sdpa"] and kinds("eager") == ["eager"]
    assert kinds("auto", attention_dropout=0.1) == kinds("auto", attn_pdrop=0.1) == ["sdpa"]
    assert kinds("auto", sliding_window=256) == [] and kinds("auto", sliding_window=512) == ["blocks", "sdpa"]
