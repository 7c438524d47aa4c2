"""kernels.cpp computes what its twins in Python do, and where it cannot be built these count."""

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from studio.engine import blocks
from studio.engine.adapters import core_of, trainable_parameters
from studio.engine.attention import adopt, following, make_layout
from studio.engine.cpu import compiled
from studio.engine.cpu.compiled import CompiledHeads, CompiledLayer, CompiledRest
from studio.engine.fused import FusedLayer, fuse, keep_order
from studio.engine.head import frozen_head_gradient
from studio.engine.parts import GatedMlp, Heads, Norm, Rest
from tests.engine.test_fused import close, decoder, layers_of, of_tokens

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 0.02)]


def halves_of(dtype: torch.dtype, kind: str = "qwen2", **sizes: int) -> tuple[Heads, Rest]:
    """A layer's; Qwen2's query, key and value have biases."""
    layer = layers_of(decoder(kind, **sizes).to(dtype))[1]
    attention, mlp = layer.self_attn, layer.mlp
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    heads = Heads(Norm(layer.input_layernorm), attention)
    mlp = GatedMlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return heads, Rest(attention.o_proj, Norm(layer.post_attention_layernorm), mlp)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def of_heads(heads: Heads | CompiledHeads, x: Tensor, cos: Tensor, sin: Tensor, below: bool) -> list[Tensor]:
    states, kept = heads.forward(x, cos, sin, heads.lora)
    gradients = [random(*each.shape, dtype=x.dtype) for each in states]
    d_inputs, d_lora = heads.backward(*gradients, kept, below)
    return [*states, *(each for each in d_inputs if each is not None), *d_lora]


def of_rest(rest: Rest | CompiledRest, x: Tensor, attended: Tensor) -> list[Tensor]:
    out, kept = rest.forward(x, attended, rest.lora)
    d_inputs, d_lora = rest.backward(random(*x.shape, dtype=x.dtype).mul(0.1), kept, True)
    return [out, *d_inputs, *d_lora]


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=str)
@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 700])
@torch.no_grad()
def test_halves_of_a_layer_are_those_in_python(
    dtype: torch.dtype, tolerance: float, below: bool, num_tokens: int
) -> None:
    assert compiled.use("on", dtype, CPU) == ""
    heads, rest = halves_of(dtype)
    fast_heads, fast_rest = compiled.halves(heads, rest)
    x, attended = random(num_tokens, 24, dtype=dtype), random(num_tokens, 24, dtype=dtype).flip(0)
    angles = random(num_tokens, 3, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found, expected = (of_heads(each, x, cos, sin, below) for each in (fast_heads, heads))
    assert len(found) == 3 + below + 6 and close(found, expected, tolerance)
    found, expected = (of_rest(each, x, attended) for each in (fast_rest, rest))
    assert len(found) == 3 + 8 and close(found, expected, tolerance)


@needs_compiler
@pytest.mark.parametrize("num_tokens", [32, 70])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(320, 700), (296, 512)])
@torch.no_grad()
def test_layers_of_many_tiles_are_those_in_python(num_tokens: int, hidden_size: int, intermediate_size: int) -> None:
    """Sides of products that are more than one tile, and not all whole ones."""
    compiled.use("on", torch.bfloat16, CPU)
    heads, rest = halves_of(torch.bfloat16, hidden_size=hidden_size, intermediate_size=intermediate_size)
    fast_heads, fast_rest = compiled.halves(heads, rest)
    x, attended = (random(num_tokens, hidden_size, dtype=torch.bfloat16).roll(by) for by in (0, 5))
    angles = random(num_tokens, hidden_size // 8, dtype=torch.float32).repeat(1, 2).bfloat16()
    found, expected = (of_heads(each, x, angles, angles.flip(1), True) for each in (fast_heads, heads))
    assert close(found, expected, 0.02)
    found, expected = (of_rest(each, x, attended) for each in (fast_rest, rest))
    assert close(found, expected, 0.02)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=str)
@torch.no_grad()
def test_the_loss_and_its_gradient_are_those_in_python(dtype: torch.dtype, tolerance: float) -> None:
    states, head = random(300, 24, dtype=dtype), nn.Linear(24, 1000, bias=False).to(dtype)
    targets, weights = torch.arange(300) * 3, torch.linspace(0.0, 2.0, 300)
    expected = frozen_head_gradient(states, head, targets, weights)
    compiled.use("on", dtype, CPU)
    assert compiled.takes(states)
    assert close(list(frozen_head_gradient(states, head, targets, weights)), list(expected), tolerance)


@torch.no_grad()
def test_the_loss_is_as_exact_under_autocast() -> None:
    states, head = random(30, 24, dtype=torch.bfloat16), nn.Linear(24, 1000, bias=False).to(torch.bfloat16)
    arguments = states, head, torch.arange(30) * 3, torch.linspace(0.0, 0.1, 30)
    expected, _ = frozen_head_gradient(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = frozen_head_gradient(*arguments)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@needs_compiler
@torch.no_grad()
def test_angles_may_be_wider_than_what_they_turn() -> None:
    compiled.use("on", torch.bfloat16, CPU)
    heads, rest = halves_of(torch.bfloat16)
    x, angles = random(9, 24, dtype=torch.bfloat16), random(9, 3, dtype=torch.float32).repeat(1, 2)
    found, expected = (
        of_heads(each, x, angles.cos(), angles.sin(), True) for each in (compiled.halves(heads, rest)[0], heads)
    )
    assert close(found, expected, 0.02)


@needs_compiler
@pytest.mark.parametrize("wanted", ["on", "off"])
@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_has_no_logit_is_refused(target: int, wanted: str) -> None:
    compiled.use(wanted, torch.float32, CPU)
    states, head = random(2, 24, dtype=torch.float32), nn.Linear(24, 50, bias=False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        frozen_head_gradient(states, head, torch.tensor([3, target]), torch.ones(2))


@needs_compiler
def test_what_learns_may_become_narrow_later() -> None:
    """As `bf16` in a config of DeepSpeed makes it; kernels.cpp would read past its end."""
    model = decoder("llama")
    compiled.use("on", torch.float32, CPU)
    fuse(model)
    own = layers_of(model)[0].forward.__self__
    assert isinstance(own._halves(torch.ones(1, 24))[0], CompiledHeads)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert isinstance(own._halves(torch.ones(1, 24))[0], Heads)


@needs_compiler
def test_a_model_is_computed_by_it_and_learns_the_same() -> None:
    model = decoder("llama")
    expected = of_tokens(model)
    compiled.use("auto", torch.float32, CPU)
    fuse(model)
    assert all(isinstance(layer.forward.__self__, FusedLayer) for layer in layers_of(model))
    called = []
    for layer in layers_of(model):
        own = layer.forward.__self__
        own._halves = lambda x, choose=own._halves: called.append(choose(x)) or called[-1]
    assert close(of_tokens(model), expected, 1e-4)
    assert len(called) == 3 and all(isinstance(heads, CompiledHeads) for heads, _ in called)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_tokens(model)
    assert all(isinstance(heads, Heads) for heads, _ in called[3:])


def of_row(model: nn.Module, ends: list[int]) -> list[Tensor]:
    """Logits of one row that is followed as a tree, and what their sum leaves where something learns."""
    row = np.array(ends)
    positions = torch.tensor([sum(end > place for end in ends[:place]) for place in range(len(ends))])
    model.zero_grad()
    with following(make_layout("blocks", row, CPU)):
        inputs = {"input_ids": torch.arange(1, 1 + len(ends))[None], "position_ids": positions[None]}
        logits = model(**inputs, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    return [logits, *(each.grad for each in trainable_parameters(model))]


@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_layer_and_its_attention_are_one_node_that_gives_the_same(
    kind: str, keeps: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three examples that share a beginning, and one of its own; probabilities kept and computed again."""
    monkeypatch.setattr(blocks, "KEPT_KEYS", 512 if keeps else 0)
    ends = [9, 9, 9, 5, 5, 7, 7, 9, 9, 12, 12, 12]
    model = decoder(kind)
    adopt(core_of(model), "blocks")
    compiled.use("off", torch.float32, CPU)
    expected = of_row(model, ends)
    compiled.use("on", torch.float32, CPU)
    fuse(model)
    if checkpointing:
        core_of(model).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    made = []
    monkeypatch.setattr(compiled, "CompiledLayer", lambda *parts: made.append(CompiledLayer(*parts)) or made[-1])
    assert close(of_row(model, ends), expected, 1e-4)
    assert len(made) == 3 * (1 + checkpointing)


@needs_compiler
def test_what_learns_gets_its_gradient_in_one_order_where_processes_exchange_it() -> None:
    """A row with a layout, and one without, as a process has where it has nothing to compute."""
    model = decoder("llama")
    adopt(core_of(model), "blocks")
    compiled.use("on", torch.float32, CPU)
    fuse(model)
    order: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    of_row(model, [12] * 12)
    with_layout, _ = order.copy(), order.clear()
    of_tokens(model)
    assert sorted(order) == sorted(with_layout) and order != with_layout
    keep_order(model)
    order.clear()
    of_row(model, [12] * 12)
    with_layout, _ = order.copy(), order.clear()
    of_tokens(model)
    assert order == with_layout


@needs_compiler
def test_attention_that_is_not_all_blocks_stays_between_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long examples go through PyTorch's kernel."""
    monkeypatch.setattr(blocks, "LONG_TOKENS", 4)
    monkeypatch.setattr(blocks, "BLOCK_TOKENS", 3)
    monkeypatch.setattr(blocks, "SHORT_ROW", 0)
    model, ends = decoder("llama"), [10] * 10 + [12] * 2
    adopt(core_of(model), "blocks")
    compiled.use("off", torch.float32, CPU)
    expected = of_row(model, ends)
    compiled.use("on", torch.float32, CPU)
    fuse(model)
    monkeypatch.delattr(compiled, "CompiledLayer")
    assert close(of_row(model, ends), expected, 1e-4)


@needs_compiler
@pytest.mark.parametrize("limit", [0.5, 1e6, math.inf])
def test_gradients_are_clipped_as_pytorch_does(limit: float) -> None:
    compiled.use("on", torch.float32, CPU)
    shapes = [(3, 5), (40_000,), (1,), (0, 4), (7, 9)]
    found, expected = ([random(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    weights = [nn.Parameter(torch.zeros_like(each)) for each in expected]
    for weight, gradient in zip(weights, expected, strict=True):
        weight.grad = gradient
    length = nn.utils.clip_grad_norm_(weights, limit)
    assert compiled.clips(found)
    assert torch.ops.retune.clip(found, limit) == pytest.approx(float(length), rel=1e-6)
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(found, expected, strict=True))
    assert not compiled.clips([torch.zeros(4, 6).t()]) and not compiled.clips([torch.zeros(3, dtype=torch.bfloat16)])
    assert math.isnan(torch.ops.retune.clip([torch.tensor([1.0, math.nan])], limit))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_no_number_is_not_hidden(number: float, dtype: torch.dtype) -> None:
    compiled.use("on", dtype, CPU)
    heads, rest = compiled.halves(*halves_of(dtype))
    x, attended = random(5, 24, dtype=dtype), random(5, 24, dtype=dtype)
    x[2, 3] = number
    others = [True, True, False, True, True]
    out, kept = rest.forward(x, attended, rest.lora)
    assert out.isfinite().all(1).tolist() == others
    (d_x, _), d_lora = rest.backward(x, kept, True)
    assert d_x.isfinite().all(1).tolist() == others and not any(each.isfinite().all() for each in d_lora)
    ones = torch.ones(5, 6)
    (query, *_), _ = heads.forward(x, ones, ones, heads.lora)
    assert query.flatten(1).isfinite().all(1).tolist() == others


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script in its place, nothing built yet, and no other program on the PATH."""
    program = tmp_path / "bin" / "compiler"
    program.parent.mkdir()
    program.touch(mode=0o755)
    for name, value in {"XDG_CACHE_HOME": tmp_path, "CXX": "compiler", "PATH": program.parent}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(compiled, "_load", compiled._load.__wrapped__)  # not what this process has found before
    return program


def test_what_the_compiler_says_is_told_and_nothing_is_left(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text("#!/bin/sh\necho 'In file included from' >&2\necho 'x.cpp:1:2: error: no such' >&2\nexit 1\n")
    assert compiled.use("auto", torch.float32, CPU) == "compiler failed: x.cpp:1:2: error: no such"
    assert compiled.now is None and not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob(".tmp*"))


def test_a_compiler_that_hangs_is_ended_with_all_it_started(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python's twins compute then, and the log says why."""
    monkeypatch.setattr(compiled, "COMPILER_SECONDS", 1)
    part = tmp_path / "part"
    part.write_text("/bin/sleep 600\n")
    compiler.write_text(f"#!/bin/sh\n/bin/sh {part} &\nwait\n")
    assert compiled.use("auto", torch.float32, CPU) == "compiler was not done after 1 seconds"
    assert compiled.now is None and not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob(".tmp*"))
    deadline = time.monotonic() + 30
    while any(str(part) in (each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_built_by_the_compiler_alone_and_once(compiler: Path, tmp_path: Path) -> None:
    """Called twice, for the code and for the library; what this one makes cannot be loaded, and that is told, too."""
    compiler.write_text(f'#!/bin/sh\necho call >> {tmp_path}/calls\nfor last; do :; done\necho nothing > "$last"\n')
    assert all("kernels-" in compiled.use("auto", torch.float32, CPU) for _ in range(2)) and compiled.now is None
    assert (tmp_path / "calls").read_text().split() == ["call", "call"]
    [library] = tmp_path.rglob("*.so")
    assert library.read_text() == "nothing\n"


def test_without_a_compiler_python_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiled, "_load", compiled._load.__wrapped__)  # not what this process has found before
    assert compiled.use("auto", torch.float32, CPU) == "there is no C++ compiler (no-such-compiler)"
    assert compiled.now is None and compiled.halves(*halves_of(torch.float32)) is None


def test_an_empty_setting_is_none(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    assert compiled.use("auto", torch.float32, CPU) == "there is no C++ compiler (c++)"


@pytest.mark.parametrize(
    ("wanted", "dtype", "device", "why"),
    [
        ("off", torch.float32, "cpu", "train.compile is off"),
        ("auto", torch.float16, "cpu", "only for bfloat16 and float32, not float16"),
        ("auto", torch.bfloat16, "cuda", "on a GPU only where train.compile is on"),
    ],
)
def test_what_it_is_not_for(wanted: str, dtype: torch.dtype, device: str, why: str) -> None:
    assert compiled.use(wanted, dtype, torch.device(device)) == why and compiled.now is None


def tensor_of(num_bytes: int, value: int) -> Tensor:
    return torch.full((num_bytes,), value % 256, dtype=torch.uint8)


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300_000)), max_size=60))
def test_no_two_tensors_share_memory(steps: list[tuple[bool, int]]) -> None:
    """Large ones of the arena and small ones of the C library, taken and freed in any order."""
    compiled.use("on", torch.float32, CPU)
    alive: list[tuple[Tensor, int]] = []
    for number, (takes, size) in enumerate(steps):
        if takes or not alive:
            alive.append((tensor_of(size, number), number))
        else:
            alive.pop(size % len(alive))
        assert all((each == value % 256).all() for each, value in alive)
    assert all(each.data_ptr() % 64 == 0 for each, _ in alive)


NEIGHBOURS = """
from itertools import permutations
import torch
from studio.engine.cpu import compiled
assert not compiled.use("on", torch.float32, torch.device("cpu"))
for order in permutations(range(4)):
    pieces = [torch.empty(50_000 + 64 * size, dtype=torch.uint8) for size in range(4)]
    first, behind = pieces[0].data_ptr(), torch.empty(40_000, dtype=torch.uint8)
    for each in order:
        pieces[each] = None
    whole = torch.empty(200_000, dtype=torch.uint8)
    assert whole.data_ptr() == first, (order, whole.data_ptr(), first)
    del whole, behind
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="tensors are the C library's elsewhere")
def test_neighbours_that_are_free_are_one_piece() -> None:
    """In whatever order four are freed, the next large tensor stands where they have been. In a process of its own,
    where nothing else is free."""
    subprocess.run([sys.executable, "-c", NEIGHBOURS], check=True)
