"""Every kind of attention over a row sees what the layout says, and has the gradient of float32 SDPA with a mask."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from studio.data.packing import Ints, PrefixTree, few_rooms, filler, grow_tree
from studio.data.tokens import Example
from studio.engine import attention, blocks
from studio.engine.attention import Chains, Layout, Masked
from studio.engine.blocks import Blocks, cut, hidden_from
from studio.engine.cpu import compiled
from studio.engine.cuda import flex, measured
from studio.engine.cuda.flex import Flex
from studio.engine.models.load import GPU_KERNELS, pick_attention
from studio.errors import ModelError

CPU = torch.device("cpu")
WAYS = ("off", "on") if shutil.which("c++") else ("off",)  # of computing blocks: with calls, or compiled


@st.composite
def rows(draw: st.DrawFn) -> Ints:
    """`ends` of one or more trees in a row."""
    return ends_of(draw(forests()))


@st.composite
def forests(draw: st.DrawFn) -> list[PrefixTree]:
    trees = []
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=30), min_size=1, max_size=8))
        trees.append(grow_tree([Example(each, each) for each in sorted(ids)]))
    return trees


def ends_of(trees: list[PrefixTree]) -> Ints:
    starts = np.cumsum([0, *(len(tree) for tree in trees[:-1])])
    return np.concatenate([tree.ends + start for tree, start in zip(trees, starts, strict=True)])


def chains(*lengths: int) -> Ints:
    """Examples that share nothing, one after another."""
    return np.repeat(np.cumsum(lengths), lengths)


def tree(shared: int, *lengths: int) -> Ints:
    """Examples that share their beginning, and nothing else."""
    return np.concatenate([np.full(shared, shared + sum(lengths)), shared + chains(*lengths)])


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


def flex_in_plain_words(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, enable_gqa: bool
) -> Tensor:
    """What `flex_attention` documents: blocks with the mask, blocks computed whole, and no other."""
    size, num_tokens = block_mask.BLOCK_SIZE[0], query.shape[2]
    places = torch.arange(num_tokens)
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for kind in ("", "full_"):
        for row, count in enumerate(getattr(block_mask, f"{kind}kv_num_blocks")[0, 0]):
            for column in getattr(block_mask, f"{kind}kv_indices")[0, 0, row, :count]:
                asking, other = places[row * size : (row + 1) * size, None], places[column * size : (column + 1) * size]
                sees = torch.ones(len(asking), len(other), dtype=torch.bool)
                seen[asking, other] = sees if kind else block_mask.mask_mod(None, None, asking, other)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
    )


def states(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Query of 6 heads, key and value of 2."""
    generator = torch.Generator().manual_seed(num_tokens)
    made = [torch.randn(heads, num_tokens, 16, generator=generator).to(dtype) for heads in (6, 2, 2)]
    return [each.requires_grad_() for each in made]


def attended(layout: Layout, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    out = layout.attend(*inputs, scaling=0.25)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def check(layout: Layout, ends: Ints, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    inputs = states(len(ends), dtype)
    expected = attended(Masked(ends, CPU), [each.detach().float().requires_grad_() for each in inputs])
    for found, wanted in zip(attended(layout, inputs), expected, strict=True):
        assert (found.float() - wanted).detach().norm() <= tolerance * max(1.0, float(wanted.detach().norm()))


@settings(deadline=None, max_examples=40)
@given(rows())
def test_each_kind_of_attention_equals_float32_sdpa(ends: Ints) -> None:
    for wanted in WAYS:
        compiled.use(wanted, torch.float32, CPU)
        check(Blocks(ends), ends)
    check(Chains(ends, CPU, varlen_in_plain_words), ends)
    check(Flex(ends, CPU, flex_in_plain_words), ends)


@settings(deadline=None, max_examples=30)
@given(forests())
def test_a_filler_changes_nothing_for_the_others(trees: list[PrefixTree]) -> None:
    """Rows of a fixed size: what the filler gets has no weight, and the others see what they saw."""
    ends, filled = ends_of(trees), ends_of([*trees, filler(trees, few_rooms)])
    assert len(filled) % 64 == 0 and len(filled) > len(ends)
    inputs = states(len(ends), torch.float32)
    expected = attended(Masked(ends, CPU), inputs)
    chance = torch.Generator().manual_seed(2)
    more = [torch.randn(len(each), len(filled) - len(ends), 16, generator=chance) for each in inputs]
    longer = [torch.cat(pair, 1) for pair in zip(inputs, more, strict=True)]
    for layout in (
        Masked(filled, CPU),
        Blocks(filled),
        Chains(filled, CPU, varlen_in_plain_words, fixed=True),
        Flex(filled, CPU, flex_in_plain_words),
    ):
        whole = layout.attend(*longer, scaling=0.25)
        out, shapes = whole[: len(ends)], [each.shape for each in layout.tensors]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found = [out, *torch.autograd.grad((out * weights).sum() + 0 * whole.sum(), inputs)]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * max(1.0, float(other.norm()))
        assert all(shape[-1] % 64 <= 1 for shape in shapes), shapes


@pytest.mark.parametrize("lengths", [(300, 700, 3), (128, 128), (500,), (64, 1, 400)], ids=str)
def test_flex_leaves_out_what_nobody_sees(lengths: tuple[int, ...]) -> None:
    """Every block that somebody sees is computed, with the mask where not all see all; and the same backwards."""
    ends = chains(*lengths)
    check(Flex(ends, CPU, flex_in_plain_words), ends)
    mask = Flex(ends, CPU).block_mask
    padding = -len(ends) % flex.BLOCK
    seen = functional.pad(~hidden_from(ends, 0, len(ends)), (0, padding, 0, padding))
    tiles = seen.unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK))
    assert mask.to_dense()[0, 0].bool().equal(tiles.any(3).any(1))
    for numbers, which, transposed in (("kv_num_blocks", "kv_indices", False), ("q_num_blocks", "q_indices", True)):
        whole = dense(getattr(mask, f"full_{numbers}"), getattr(mask, f"full_{which}"))
        assert not (whole & dense(getattr(mask, numbers), getattr(mask, which))).any()
        everywhere = tiles.all(3).all(1)
        assert whole.equal((everywhere.T if transposed else everywhere) & whole) and (len(ends) < 400 or whole.any())


def dense(numbers: Tensor, which: Tensor) -> Tensor:
    found = torch.zeros(which.shape[2:], dtype=torch.bool)
    for row, count in enumerate(numbers[0, 0]):
        found[row, which[0, 0, row, :count].long()] = True
    return found


def test_pytorch_itself_reads_the_blocks_and_compiles_few_times() -> None:
    """Forward only: PyTorch has no backward pass of FlexAttention on a CPU."""
    counter = CompileCounter()
    kernel = torch.compile(flex_attention, backend=counter)
    with torch.no_grad():
        for lengths in [(300, 20), (100, 220), (50, 60, 210), (700,), (10, 900), (500, 77)]:
            ends = chains(*lengths)
            inputs = [each.detach() for each in states(len(ends), torch.float32)]
            found = Flex(ends, CPU, kernel).attend(*inputs, 0.25)
            assert torch.allclose(found, Masked(ends, CPU).attend(*inputs, 0.25), atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("wanted", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [(300,), (40, 700, 3), (1500, 20, 1100), (2, 1)], ids=str)
def test_long_and_short_examples(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float, wanted: str) -> None:
    compiled.use(wanted, torch.float32, CPU)
    ends = chains(*lengths)
    check(Blocks(ends), ends, dtype, tolerance)


@pytest.mark.parametrize("wanted", WAYS)
def test_scores_of_hundreds_are_not_rounded(wanted: str) -> None:
    """As trained models have them; in bfloat16 their differences would be gone."""
    compiled.use(wanted, torch.float32, CPU)
    ends = chains(60, 30)
    query, key, value = (each.detach() for each in states(len(ends), torch.bfloat16))
    query, key = query * 8 + 30, key * 8 + 30
    found = Blocks(ends).attend(query, key, value, 0.25)
    expected = Masked(ends, CPU).attend(query.float(), key.float(), value.float(), 0.25)
    assert (found.float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("wanted", WAYS)
def test_probabilities_may_be_computed_again(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    compiled.use(wanted, torch.float32, CPU)
    ends = chains(200, 90)
    monkeypatch.setattr(blocks, "KEPT_KEYS", 0)
    check(Blocks(ends), ends)


@pytest.mark.parametrize("keys", [0, 512])
@pytest.mark.parametrize("lengths", [(200, 90), (300,), (20, 300)], ids=str)
@pytest.mark.parametrize("wanted", WAYS)
def test_values_may_be_narrower_than_keys(
    monkeypatch: pytest.MonkeyPatch, wanted: str, lengths: tuple[int, ...], keys: int
) -> None:
    """As DeepSeek's latent attention has them; also where PyTorch's kernel computes a long example, or all there is."""
    compiled.use(wanted, torch.float32, CPU)
    monkeypatch.setattr(blocks, "KEPT_KEYS", keys)
    monkeypatch.setattr(blocks, "LONG_TOKENS", 256)
    ends = chains(*lengths)
    query, key, value = (each.detach() for each in states(len(ends), torch.float32))
    inputs = [each.requires_grad_() for each in (query, key, value[..., :8])]
    for found, expected in zip(attended(Blocks(ends), inputs), attended(Masked(ends, CPU), inputs), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(len(WAYS) == 1, reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("keys", [0, 512])
@pytest.mark.parametrize("value_width", [64, 32, 40])
@pytest.mark.parametrize("num_key_heads", [1, 2])
@pytest.mark.parametrize(
    "ends",
    [
        chains(5),
        chains(40, 90, 30),
        chains(200, 90, 130),
        tree(9, 4, 5),
        tree(60, 70, 80, 200, 10),
        tree(20, *[110] * 17),
    ],
    ids=len,
)
def test_blocks_of_wide_heads_in_16_bits_are_as_exact_as_their_numbers(
    monkeypatch: pytest.MonkeyPatch, ends: Ints, num_key_heads: int, value_width: int, keys: int
) -> None:
    """Heads as wide as models have them go by tiles where the processor has these; sums are float32."""
    compiled.use("on", torch.bfloat16, CPU)
    monkeypatch.setattr(blocks, "KEPT_KEYS", keys)
    generator = torch.Generator().manual_seed(len(ends))
    shapes = (4, 64), (num_key_heads, 64), (num_key_heads, value_width)
    row = [torch.randn(heads, len(ends), width, generator=generator).bfloat16() for heads, width in shapes]
    found = attended(Blocks(ends), [each.clone().requires_grad_() for each in row])
    expected = attended(Masked(ends, CPU), [each.float().requires_grad_() for each in row])
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm()


@pytest.mark.skipif(len(WAYS) == 1, reason="compiling needs a C++ compiler")
def test_probabilities_that_are_not_kept_are_let_go_group_by_group() -> None:
    compiled.use("on", torch.float32, CPU)
    row = [each.detach().transpose(0, 1).contiguous() for each in states(900, torch.float32)]
    plan = Blocks(chains(300, 600))._plan
    own = plan.compiled(2, 0.25, row[2])
    out, *kept = own.forward(*row, True)
    assert len(kept) == len(plan.groups) > 1
    [alone] = own.forward(*row, False)
    assert alone.equal(out)


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


def test_a_gpu_takes_the_kind_that_was_measured_to_be_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"varlen": 2.0, "flex": 1.0, "sdpa": 3.0}
    monkeypatch.setattr(attention, "_gpu_kinds", lambda dtype, device: list(times))
    monkeypatch.setattr(measured, "_key", lambda device: "a card")
    asked = iter(times.values())
    monkeypatch.setattr(measured, "seconds", lambda way, device: next(asked) / 1000)
    config = type("Config", (), {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96})
    gpu = torch.device("cuda")
    for _ in range(2):  # the second time from memory: nothing more is measured
        found = dict(attention.choices("auto", config, 512, torch.bfloat16, gpu))
        assert list(found) == ["flex", "varlen", "sdpa"]
    assert "flex 1 ms" in found["flex"] and "varlen 2 ms" in found["flex"]
    assert dict(attention.choices("flex", config, 512, torch.bfloat16, gpu)) == {"flex": "as configured"}


def test_a_trial_computes_forward_and_backward() -> None:
    ends = attention.typical_row(64)
    shapes = [(heads, len(ends), 16) for heads in (6, 2, 2)]
    run = attention._trial("blocks", ends, shapes, torch.float32, CPU)
    with torch.no_grad():  # as where a kind is chosen
        assert [each.shape for each in run()] == shapes
    assert (ends[:8] == len(ends)).all() and set(np.diff(np.unique(ends[8:-24]))) == {24}


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_what_needs_a_gpu_is_refused_without(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} cannot run on cpu"):
        pick_attention(name, CPU)
    assert pick_attention("auto", CPU) == "sdpa"
