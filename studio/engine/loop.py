"""One optimizer step: loss and gradient over all trained tokens of the step, however it is split into micro-batches."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.config.schema import RunConfig, TrainSection
from studio.data.tokens import Example
from studio.engine.adapters import core_of, learning_rate_factors, trainable_parameters
from studio.engine.allocator import keep_freed
from studio.engine.attention import following
from studio.engine.batches import Batch
from studio.engine.cpu import compiled
from studio.engine.distributed import Alone
from studio.engine.forward import Forward
from studio.engine.generate import quiet
from studio.engine.head import HEAD_ROWS
from studio.errors import ConfigError, Problem, StudioError


class NotFiniteError(StudioError):
    """Loss or gradient became NaN or infinite, as `what` says; the step was not taken."""

    def __init__(self, what: str, step: int, rate: float) -> None:
        super().__init__(
            f"Training broke down at step {step}: {what}. The step was not taken; earlier checkpoints are unharmed.",
            f"Try a smaller train.learning_rate (now {rate:g}), more warmup_steps, or model.dtype float32, and look at "
            "the rows of this step.",
        )
        self.what = what


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step.

    `num_tokens` are those of its examples, `num_computed_tokens` those that went through the model: fewer where
    examples share their beginnings, more where they are padded.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_trained_tokens: int
    num_computed_tokens: int
    seconds: float


class Trainer:
    """A model, its optimizer, and the arithmetic of a step, from examples to changed weights."""

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        dtype: torch.dtype,
        num_steps: int,
        pad_id: int,
        ranks: Alone | None = None,
    ) -> None:
        keep_freed()
        self.model = model
        self.ranks = ranks or Alone()
        self.num_steps = num_steps
        self.micro_batch_size = config.train.micro_batch_size  # may be made smaller while the run goes on
        self.warmup_steps = warmup_steps(config.train, num_steps)
        self._config = config
        self._dtype = dtype
        self._device = next(model.parameters()).device
        self._parameters = trainable_parameters(model)
        factors = learning_rate_factors(model, config)
        self.optimizer = make_optimizer(self._parameters, config.train, self._device, factors)
        scales = dtype == torch.float16 and not self.ranks.takes_steps
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=scales)
        self.scaler.scale(torch.zeros(1, device=self._device))  # it has a scale from here on, which _gradients reads
        if config.train.gradient_checkpointing:  # the non-reentrant kind needs no gradient at the inputs
            core_of(model).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.forward = Forward(model, config, dtype, pad_id)
        self._prepared: tuple[list[Example], int, Future[list[Batch]]] | None = None

    @property
    def packing(self) -> str:
        """How examples are laid out: as configured, or what this model can follow."""
        return self.forward.packing

    def ahead(self, steps: Iterator[list[Example]]) -> Iterator[list[Example]]:
        """The same steps (without end), the batches of each made in a thread while the one before it is taken."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as maker:

            def prepare() -> tuple[list[Example], int, Future[list[Batch]]]:
                examples = next(steps)
                return examples, self.micro_batch_size, maker.submit(self._batches, examples)

            upcoming = prepare()
            while True:
                self._prepared = upcoming
                upcoming = prepare()
                yield self._prepared[0]

    def step(self, examples: Sequence[Example], number: int) -> StepResult:
        """Take optimizer step `number` (from 1) on these examples. Raises NotFiniteError before the weights change."""
        started = time.perf_counter()
        batches = self.ranks.made_by_all(lambda: self._made(examples))
        num_trained, num_tokens, num_computed = self._count(batches)
        losses = self._gradients(batches, num_trained)
        loss = self.ranks.sums(float(torch.stack(losses).sum()))[0]
        rate = learning_rate(self._config.train, number, self.num_steps, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)  # checkpoints of older versions have none
        grad_norm = self._update(loss, number)
        seconds = time.perf_counter() - started
        return StepResult(loss, grad_norm, rate, num_tokens, num_trained, num_computed, seconds)

    def join(self, ranks: Alone) -> None:
        """Train together with other processes from here on; all have the same weights."""
        self.ranks = ranks
        if ranks.partitions_weights:
            self.forward.use_own_layers()
        elif ranks.takes_steps:
            self.forward.keep_order()
        ranks.wrap(self.model, self.optimizer, self.forward.graph, self._config, self._dtype)

    def _made(self, examples: Sequence[Example]) -> list[Batch]:
        """Batches that were made ahead, unless micro-batches have become smaller since."""
        if self._prepared and self._prepared[0] is examples and self._prepared[1] == self.micro_batch_size:
            return self._prepared[2].result()
        return self._batches(examples)

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        return self.forward.batches(examples, self.micro_batch_size, (self.ranks.rank, self.ranks.world))

    def _count(self, batches: Sequence[Batch]) -> list[int]:
        """Trained tokens, tokens, and tokens that are computed of the step, in all processes."""
        counts = [(batch.num_trained_tokens, batch.num_tokens, batch.input_ids.numel()) for batch in batches]
        return [int(total) for total in self.ranks.sums(*(sum(column) for column in zip(*counts, strict=True)))]

    def _gradients(self, batches: Sequence[Batch], num_trained: int) -> list[Tensor]:
        """Leave this process's gradient, and return its part of the loss by micro-batch."""
        if not self.ranks.takes_steps:
            self.optimizer.zero_grad(set_to_none=not self.forward.keeps_gradients)
            scale = self.scaler.get_scale()  # 1 unless numbers are float16
            losses = [self.forward.backward(batch.to(self._device), num_trained, scale) for batch in batches]
            self.ranks.require_all_fit()
            self.ranks.sum_gradients(self._parameters)
            return losses
        num_pieces = [-(-len(batch.targets) // HEAD_ROWS) for batch in batches]
        most = self.ranks.largest(max(num_pieces)) if self.ranks.partitions_weights else 0
        losses = []
        for place, (batch, pieces) in enumerate(zip(batches, num_pieces, strict=True), 1):
            with following(batch.layout), self.forward.same_inputs():
                part = (batch.to(self._device), num_trained, most or pieces)
                losses.append(self.ranks.backward(place == len(batches), *part))
        return losses

    def _update(self, loss: float, number: int) -> float:
        """Change the weights and return the gradient's norm. Raises NotFiniteError when they were not changed."""
        if self.ranks.takes_steps:
            grad_norm = self.ranks.step()  # skipped, and the gradient forgotten, where it is not finite
            self._require_finite(loss, grad_norm, number)
            return grad_norm
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        self._require_finite(loss, grad_norm, number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def evaluate(self, examples: Sequence[Example], check_stop: Callable[[], None] = lambda: None) -> float:
        """Mean cross-entropy over all trained tokens of `examples`; nan when there are none.

        `check_stop` is called before every micro-batch, and may raise.
        """
        total, num_trained = 0.0, 0
        size = self._config.examples_per_step
        in_pieces = not self.ranks.partitions_weights  # else as many calls of the head in every process
        with quiet(self.model):
            for start in range(0, len(examples), size):
                for batch in self._batches(examples[start : start + size]):
                    check_stop()
                    num_trained += batch.num_trained_tokens
                    total += self.forward.loss(batch.to(self._device), in_pieces)
        self.ranks.require_all_fit()
        total, num_trained = self.ranks.sums(total, num_trained)
        return total / num_trained if num_trained else math.nan

    def _clip(self) -> float:
        limit = self._config.train.max_grad_norm or math.inf
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        if compiled.clips(gradients):
            return float(torch.ops.retune.clip(gradients, limit))
        return float(nn.utils.clip_grad_norm_(self._parameters, limit))

    def _require_finite(self, loss: float, grad_norm: float, number: int) -> None:
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self._scaled_too_far()):
            return
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
        raise NotFiniteError(what, number, self._config.train.learning_rate)

    def _scaled_too_far(self) -> bool:
        """Whether a gradient may be infinite for its scale alone, which is halved then; the scaler skips the step."""
        if self.ranks.takes_steps:
            return self._dtype == torch.float16
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1


def warmup_steps(train: TrainSection, num_steps: int) -> int:
    """Warm-up of a run: the configured share of it, or steps; a tenth of a run that is too short for so many."""
    if train.warmup_ratio is not None:
        return int(train.warmup_ratio * num_steps)
    return train.warmup_steps if train.warmup_steps < num_steps else num_steps // 10


def learning_rate(train: TrainSection, step: int, num_steps: int, num_warmup: int) -> float:
    """Learning rate of a step (from 1): a straight rise to the peak at step `num_warmup`, then the schedule."""
    if step <= num_warmup:
        return train.learning_rate * step / num_warmup
    done = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)  # 0 at the first step after warm-up, below 1
    falling = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[train.schedule]
    lowest = train.final_learning_rate_ratio
    return train.learning_rate * (lowest + (1 - lowest) * falling)


def make_optimizer(
    parameters: list[nn.Parameter],
    train: TrainSection,
    device: torch.device,
    factors: Mapping[nn.Parameter, float] | None = None,
) -> Any:
    """AdamW, or its 8-bit kin of bitsandbytes, whose groups bear `lr_factor`: `factors`, 1 for all other weights.

    Raises ConfigError where that cannot run.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for each in parameters:
        groups.setdefault(((factors or {}).get(each, 1.0), each.ndim < 2), []).append(each)
    settings = [
        {"params": members, "weight_decay": 0.0 if is_vector else train.weight_decay, "lr_factor": factor}
        for (factor, is_vector), members in sorted(groups.items(), key=lambda group: group[0])
    ]
    arguments = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2)}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(settings, fused=True, **arguments)
    if train.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        raise _optimizer_error(train.optimizer, "pages between GPU and CPU memory, and there is no GPU here")
    try:
        from bitsandbytes import optim  # imported here: it costs seconds, and few runs need it

        kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
        return kind(settings, **arguments)
    except (ImportError, RuntimeError, OSError) as error:
        raise _optimizer_error(train.optimizer, f"cannot run here: {' '.join(str(error).split())[:200]}") from error


def _optimizer_error(name: str, reason: str) -> ConfigError:
    return ConfigError([Problem("train.optimizer", f"{name} {reason}", "adamw")])
