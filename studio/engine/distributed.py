"""Several processes that train one model, behind one small interface: alone, whole copies (DDP), or DeepSpeed's ZeRO.

Every process plans the whole step and computes its part of the rows. The loss of a step is the mean over the trained
tokens of all processes: each divides its sum by the global count, and what they compute is added up, once. Rank 0 alone
writes to the database, the log and (but for ZeRO's own files) the disk; what it decides, the others are told.
"""

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from studio.config import zero
from studio.config.schema import RunConfig
from studio.engine import extensions
from studio.engine.checkpoint import write_pth
from studio.engine.memory_full import is_memory_full
from studio.errors import CheckpointError, ConfigError, Problem

BUCKET_ELEMENTS = 8 * 2**20  # gradients travel in pieces of this size
TIMEOUT = timedelta(hours=2)  # rank 0 may evaluate and save; who dies is found by the job, not by a timeout
Loss = Callable[..., Tensor]
Made = TypeVar("Made")


class Alone:
    """One process. Also what the others build on."""

    world, rank, local_rank = 1, 0, 0
    partitions_weights = False  # a weight is whole only while its module computes
    takes_steps = False  # clips, steps and saves by itself
    stage: int | None = None  # of ZeRO
    _num_full: int | None = None  # processes whose memory ran out in this try; None: not asked yet

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the other processes. Everything that takes one of them long is done before."""

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Loss, config: RunConfig, dtype: torch.dtype) -> None:
        """Take charge of a model that is the same in every process; `loss` is what `backward` computes."""

    def sums(self, *values: float) -> list[float]:
        """Each value added up over the processes."""
        return list(values)

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        return value

    def share(self, value: Any) -> Any:
        """Rank 0's value (JSON), in every process."""
        return value

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor (all of one shape), by rank."""
        return [tensor]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up what the processes have computed."""

    def num_learned(self, parameters: Iterable[nn.Parameter]) -> int:
        """Numbers in these weights, in all processes together; one that all have counts once."""
        return sum(getattr(each, "ds_numel", each.numel()) for each in parameters)

    def are_finite(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether no weight is NaN or infinite, in all processes; they ask it together."""
        found = [self._is_finite(parameter) for parameter in parameters]
        return not self.largest(int(not all(found)))

    def _is_finite(self, parameter: nn.Parameter) -> bool:
        return bool(torch.isfinite(parameter).all())

    def begin_try(self) -> None:
        """A step is taken or an evaluation made, perhaps not for the first time."""
        self._num_full = None

    def made_by_all(self, make: Callable[[], Made]) -> Made:
        """What this process makes for itself, before it exchanges anything with the others in this try.

        Raises torch's or Python's error in a process whose memory ran out, MemoryError in the others.
        """
        try:
            made, failure = make(), None
        except (RuntimeError, MemoryError) as error:
            if not is_memory_full(error):
                raise
            made, failure = None, error
        num_full = int(self.sums(failure is not None)[0])
        if num_full:
            self._num_full = num_full
            raise failure or MemoryError(f"in {num_full} of the other processes")
        return made

    def require_all_fit(self) -> None:
        """Asked by each process that has computed its part, before anything is made of the parts.

        Raises MemoryError when another one could not.
        """
        self._ask_who_is_full(own=0)
        if self._num_full:
            raise MemoryError(f"in {self._num_full} of the other processes")

    def all_try_again(self) -> bool:
        """Asked once memory has run out: whether every process can take the step again, for nothing came of it yet."""
        if self._num_full is None:
            self._ask_who_is_full(own=1)
        return bool(self._num_full)  # 0: all had computed their parts, and weights may have changed

    def _ask_who_is_full(self, own: int) -> None:
        self._num_full = int(self.sums(own)[0])

    def leave(self) -> None:
        """Part from the others."""


class Copies(Alone):
    """DDP: every process has the whole model; gradients are added up when the step's last micro-batch is done.

    torch's own wrapper adds them up while the backward pass goes on, and wants one backward pass a micro-batch through
    the wrapper's forward; ours has several (head, then the rest). An adapter's gradients are a few megabytes.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._device = torch.device("cpu")

    def join(self, device: torch.device) -> None:
        self._device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        if distributed.is_initialized():
            return
        # Deprecations inside torch are nothing that a person training a model can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        own = {"device_id": device} if device.type == "cuda" else {}
        distributed.init_process_group(backend, timeout=TIMEOUT, **own)

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Loss, config: RunConfig, dtype: torch.dtype) -> None:
        with torch.no_grad():
            for parameter in _learned(optimizer):
                distributed.broadcast(parameter.data, 0)

    def sums(self, *values: float) -> list[float]:
        return self._reduced(values, torch.float64, distributed.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        return int(self._reduced([value], torch.int64, distributed.ReduceOp.MAX)[0])

    def _reduced(self, values: Sequence[float], dtype: torch.dtype, how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=dtype, device=self._device)
        distributed.all_reduce(tensor, how)
        return tensor.tolist()

    def share(self, value: Any) -> Any:
        text = json.dumps(value).encode() if self.is_first else b""
        size = torch.tensor([len(text)], device=self._device)
        distributed.broadcast(size, 0)
        if not self.is_first:
            text = bytes(int(size))
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device)
        distributed.broadcast(data, 0)
        return json.loads(bytes(data.cpu().numpy()))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        own = tensor.to(self._device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(found, own)
        return [each.to(tensor.device) for each in found]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in parameters]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, whole in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(whole.view_as(gradient))

    def leave(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


class Sharded(Copies):
    """DeepSpeed: optimizer, gradients and (stage 3) weights are shared out. It clips and steps by itself."""

    takes_steps = True

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._values = zero.chosen(config)
        self._engine: Any = None
        self.stage = zero.stage_of(self._values)
        self.partitions_weights = self.stage == 3

    def join(self, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().join(device)
        deepspeed = _import_deepspeed()
        extensions.prepare()
        deepspeed.init_distributed(dist_backend=distributed.get_backend())

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Loss, config: RunConfig, dtype: torch.dtype) -> None:
        num_learning = sum(map(torch.numel, _learned(optimizer)))
        values = zero.complete(self._values, config, str(dtype).removeprefix("torch."), num_learning)
        module = LossModule(model, loss)
        self._engine, *_ = _import_deepspeed().initialize(model=module, optimizer=optimizer, config=values)
        self._engine.checkpoint_engine = _safe_checkpoints()
        self._engine._copy_recovery_script = lambda path: None  # a script beside the files that loads them unsafely

    def all_try_again(self) -> bool:
        return bool(self._num_full)  # else passes have exchanged gradients or weights already

    def backward(self, last: bool, *arguments: Any) -> Tensor:
        """Loss of a micro-batch, its gradient added to the step's; `last` ends the step's accumulation."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(*arguments)
        # DeepSpeed takes the mean over processes, and the loss is divided by the tokens of all of them already.
        self._engine.backward(loss * self.world, scale_wrt_gas=False)
        return loss.detach()

    def step(self) -> float:
        """Clip, and change the weights unless the gradient is not finite; its norm before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _is_finite(self, parameter: nn.Parameter) -> bool:
        """A weight that is shared out is put together first: what stands in its place here has no elements."""
        if not self.partitions_weights:
            return super()._is_finite(parameter)
        with _import_deepspeed().zero.GatheredParameters([parameter]):
            return super()._is_finite(parameter)

    def save(self, folder: Path, content: dict[str, Any], only_learned: bool) -> None:
        """DeepSpeed's files of every process in `folder`, which all of them see. `content`: plain values, tensors.

        Raises OSError, in every process, when a file of any of them could not be written.
        """
        files = self._engine.checkpoint_engine
        files.failure = 0
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=content,
            save_latest=False,
            exclude_frozen_parameters=only_learned,
        )
        if failure := self.largest(files.failure):
            raise OSError(failure, os.strerror(failure), folder.name)

    def load(self, folder: Path, only_learned: bool) -> None:
        """Weights, masters and optimizer of every process, as `save` left them in as many processes."""
        try:
            self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not only_learned)
        except (RuntimeError, KeyError, ValueError, AssertionError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{folder.name} cannot be loaded by DeepSpeed: {' '.join(str(error).split())[:300]}",
                "Resume with the number of processes and the ZeRO stage that it was saved with.",
            ) from error

    def leave(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        super().leave()


class LossModule(nn.Module):
    """A model and its loss as one module: DeepSpeed gathers weights for what is called through it.

    The model is called `llm`, as in XTuner, so the files of both have the same names.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.llm = model
        self._loss = loss
        if not all(parameter.requires_grad for parameter in model.parameters()):
            self.register_state_dict_post_hook(_leave_out_frozen)

    def forward(self, *arguments: Any) -> Tensor:
        return self._loss(*arguments)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """DeepSpeed itself leaves frozen weights in that have two names (tied ones), and the constants of 4-bit ones."""
    learned = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in state.keys() - learned:
        del state[name]


def ranks_of(config: RunConfig) -> Alone:
    """This process's place among those that train together. Raises ConfigError when DeepSpeed cannot be had."""
    strategy = config.distributed.strategy
    if strategy == "none":
        return Alone()
    return Sharded(config) if strategy == "deepspeed" else Copies()


def _import_deepspeed() -> Any:
    try:
        import deepspeed  # noqa: PLC0415  # seconds, and only runs that use it should pay
        from deepspeed.utils import logger
    except ImportError as error:
        raise ConfigError(
            [Problem("distributed.strategy", f"deepspeed cannot be used here: {str(error)[:200]}", "none, ddp")]
        ) from error
    logger.setLevel("WARNING")
    return deepspeed


def _safe_checkpoints() -> Any:
    """DeepSpeed's way to its files, but opening them can run no code."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    class SafeCheckpoints(TorchCheckpointEngine):
        """`failure`: errno of the first thing that could not be written, 0 while all could.

        It is not raised: DeepSpeed has the processes meet after their files are written, and those that could write
        theirs would wait there for ever.
        """

        failure = 0

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            with self._noting_failure():
                super().makedirs(path, exist_ok)

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            with self._noting_failure():
                write_pth(Path(path), state_dict)

        @contextlib.contextmanager
        def _noting_failure(self) -> Iterator[None]:
            try:
                yield
            except OSError as error:
                print(f"a file of this process could not be written: {error}", file=sys.stderr, flush=True)
                self.failure = self.failure or error.errno or errno.EIO

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpoints()


def _learned(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to BUCKET_ELEMENTS together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (
            tensor.dtype != bucket[0].dtype or sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET_ELEMENTS
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
