"""A micro-batch's forward and backward pass as a CUDA graph: recorded once for each size of row, replayed after that.

A small model's pass is some thousand kernels that take less time than it takes to start them; a graph starts them all
at once. It reads and writes the same memory at every replay, so a row's numbers are copied into the tensors of the row
that was recorded, and gradients are added up in place. Rows of a fixed size (`filler`) have tensors of few shapes.

PyTorch: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from studio.config.schema import RunConfig
from studio.engine.batches import Batch
from studio.engine.cuda import measured
from studio.engine.memory_full import is_memory_full
from studio.engine.models.load import GPU_KERNELS
from studio.errors import ConfigError, Problem

MOST_RECORDED = 24  # sizes: each keeps what it computes with
TOLERANCE = 0.02  # of a gradient's length: sums in another order differ by less, even of 16-bit numbers
KINDS = ("sdpa", *GPU_KERNELS)  # of attention, whose layouts have tensors of fixed shapes
Pass = Callable[[Batch], Tensor]
"""Adds a batch's gradient, returns its loss; weights of the batch say how much it counts."""
Shapes = tuple[torch.Size, ...]


class Recorder(Protocol):
    """How a device records what it is given to do."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do it now, in a way after which it can be recorded."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Without doing it; what does it again each time it is called. Raises RuntimeError where it cannot be."""


class CudaRecorder:
    """On a stream of its own: recording fails once PyTorch has seen a weight's gradient on the default stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            result = work()
        around.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Batches are made ahead in another thread, which may go on meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream(self._stream.device)):  # where a capture that fails comes back
            with capture:
                result = work()

        def replay() -> Tensor:
            graph.replay()
            return result.clone()

        return replay


class Recorded:
    """One pass over tensors that stay where they are."""

    def __init__(self, compute: Pass, batch: Batch, recorder: Recorder) -> None:
        self._own = copy.deepcopy(batch)
        self._replay = recorder.record(lambda: compute(self._own))

    def __call__(self, batch: Batch) -> Tensor:
        for own, new in zip(self._own.tensors, batch.tensors, strict=True):
            own.copy_(new, non_blocking=True)
        return self._replay()


class Replays:
    """Computes passes, those of a size that came before by replaying; says in the log whether it does, and why (not).

    Before the first replay counts, it must have the gradient of the ordinary pass and, unless `must`, be faster.
    `given_up`: no pass is replayed any more.
    """

    def __init__(
        self, compute: Pass, parameters: Sequence[nn.Parameter], recorder: Recorder, device: torch.device, must: bool
    ) -> None:
        self._compute, self._parameters, self._recorder = compute, parameters, recorder
        self._device, self._must = device, must
        self._seen: set[Shapes] = set()
        self._recorded: dict[Shapes, Recorded] = {}
        self._gradients: list[Tensor | None] = []
        self.given_up, self._is_proven = False, False

    def __call__(self, batch: Batch) -> Tensor:
        shapes = tuple(tensor.shape for tensor in batch.tensors)
        if self._may_replay(batch, shapes) and (replay := self._recorded.get(shapes) or self._record(batch, shapes)):
            return replay(batch)
        self._seen.add(shapes)
        return self._recorder.run(lambda: self._compute(batch))

    def _may_replay(self, batch: Batch, shapes: Shapes) -> bool:
        """Whether the size was computed before, which readied all that cannot be recorded."""
        gradients = [parameter.grad for parameter in self._parameters]
        if any(one is not other for one, other in zip(gradients, self._gradients, strict=False)):
            self._recorded.clear()  # they add to gradients that are gone
            self._seen.clear()
        self._gradients = gradients
        return not self.given_up and batch.layout is not None and shapes in self._seen

    def _record(self, batch: Batch, shapes: Shapes) -> Recorded | None:
        if len(self._recorded) == MOST_RECORDED:
            return None
        try:
            made = Recorded(self._compute, batch, self._recorder)
            if not self._is_proven and not self._prove(made, batch):
                return None
        except RuntimeError as error:
            if is_memory_full(error):
                raise
            self._give_up(f"it cannot be recorded: {' '.join(str(error).split())[:200]}")
            return None
        self._recorded[shapes] = made
        return made

    def _prove(self, made: Recorded, batch: Batch) -> bool:
        """Whether a replay may stand for the ordinary pass. Nothing of the trial stays in the gradient."""
        ways = {"ordinary": lambda: self._recorder.run(lambda: self._compute(batch)), "replayed": lambda: made(batch)}
        before = [gradient.clone() for gradient in self._present()]
        expected, found = (self._added(way, before) for way in ways.values())
        difference = _norm([one - other for one, other in zip(found, expected, strict=True)])
        length = _norm(expected)
        times = {} if self._must else {name: measured.seconds(way, self._device) for name, way in ways.items()}
        self._restore(before)
        if not math.isfinite(length):
            return False  # tells nothing; the next size or step will
        if not difference <= TOLERANCE * length:
            self._give_up(f"the gradient differs by {difference / length:.1e} of its length")
        elif times and measured.choose(times) != "replayed":
            self._give_up(f"it is not faster{_shown(times)}")
        else:
            self._is_proven = True
            _tell(f"replayed; its gradient is that of the ordinary pass ({difference / length:.0e}){_shown(times)}")
        return self._is_proven

    def _added(self, way: Callable[[], Tensor], before: list[Tensor]) -> list[Tensor]:
        """What a pass adds to the gradients."""
        self._restore(before)
        way()
        return [(gradient - start).float() for gradient, start in zip(self._present(), before, strict=True)]

    def _restore(self, gradients: list[Tensor]) -> None:
        for gradient, value in zip(self._present(), gradients, strict=True):
            gradient.copy_(value)

    def _present(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _give_up(self, why: str) -> None:
        self.given_up = True
        self._recorded.clear()
        if self._must:
            raise refusal(why)
        _tell(f"not used, {why}")


def replays(
    compute: Pass, parameters: Sequence[nn.Parameter], config: RunConfig, device: torch.device, obstacle: str
) -> Replays | None:
    """What computes passes by replaying, as `train.cuda_graph` asks; None for not at all.

    `obstacle` says what of the model stands against it, "" for nothing. Raises ConfigError when it must be and cannot.
    """
    wanted = config.train.cuda_graph
    if wanted == "off":
        return None
    recorder = recorder_of(device)
    why = config.graph_obstacle or obstacle if recorder else f"it needs an NVIDIA GPU, and this is a {device.type}"
    if recorder and not why:
        return Replays(compute, parameters, recorder, device, must=wanted == "on")
    if wanted == "on":
        raise refusal(why)
    _tell(f"not used, {why}")
    return None


def recorder_of(device: torch.device) -> Recorder | None:
    """None where nothing can be recorded."""
    return CudaRecorder(device) if device.type == "cuda" else None


def refusal(why: str) -> ConfigError:
    return ConfigError([Problem("train.cuda_graph", f"is on, but {why}", "off, auto")])


def _tell(what: str) -> None:
    print(f"CUDA graph: {what}", flush=True)


def _norm(tensors: Sequence[Tensor]) -> float:
    """The length of all as one vector."""
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def _shown(times: dict[str, float]) -> str:
    return "".join(f", {name} {1000 * value:.3g} ms" for name, value in times.items())
