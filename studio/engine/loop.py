"""One optimizer step: loss and gradient over all trained tokens of the step, however it is split into micro-batches."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from studio.config.schema import RunConfig, TrainSection
from studio.data.tokens import Example
from studio.engine.adapters import core_of, is_adapter, trainable_parameters
from studio.engine.batches import Batch, collate, make_batches
from studio.engine.distributed import Alone
from studio.engine.generate import quiet
from studio.engine.prefix_tree import make_tree_batches
from studio.errors import ConfigError, Problem, StudioError

HEAD_ROWS = 1024  # positions that go through the output head at once; bounds the memory of the logits


class NotFiniteError(StudioError):
    """Loss or gradient became NaN or infinite; the step was not taken."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step. `num_tokens` counts without padding."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_trained_tokens: int
    seconds: float


@dataclass(frozen=True)
class Traits:
    """How a model may be computed: head apart from the rest, several examples in one row, or as a prefix tree."""

    splits_head: bool
    isolates_packed: bool
    follows_trees: bool


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
        self.model = model
        self.ranks = ranks or Alone()
        self.num_steps = num_steps
        self.micro_batch_size = config.train.micro_batch_size  # may be made smaller while the run goes on
        self.warmup_steps = warmup_steps(config.train, num_steps)
        self._config = config
        self._dtype = dtype
        self._pad_id = pad_id
        self._core = core_of(model)
        self._device = next(model.parameters()).device
        self._parameters = trainable_parameters(model)
        self.optimizer = make_optimizer(self._parameters, config.train, self._device)
        scales = dtype == torch.float16 and not self.ranks.takes_steps
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=scales)
        if config.train.gradient_checkpointing:  # the non-reentrant kind needs no gradient at the inputs
            self._core.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.traits = self._find_traits()
        self.packing = self._choose_packing()

    def step(self, examples: Sequence[Example], number: int) -> StepResult:
        """Take optimizer step `number` (from 1) on these examples. Raises NotFiniteError before the weights change."""
        started = time.perf_counter()
        batches = self._batches(examples)
        num_trained, num_tokens = self._count(batches)
        losses = self._gradients(batches, num_trained)
        loss = self.ranks.sums(float(torch.stack(losses).sum()))[0]
        rate = learning_rate(self._config.train, number, self.num_steps, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        grad_norm = self._update(loss, number)
        return StepResult(loss, grad_norm, rate, num_tokens, num_trained, time.perf_counter() - started)

    def join(self, ranks: Alone) -> None:
        """Train together with other processes from here on; all have the same weights."""
        self.ranks = ranks
        ranks.wrap(self.model, self.optimizer, self._loss, self._config, self._dtype)

    def _count(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Trained tokens and tokens of the step, in all processes."""
        counts = [(batch.num_trained_tokens, batch.num_tokens) for batch in batches]
        num_trained, num_tokens = self.ranks.sums(*(sum(column) for column in zip(*counts, strict=True)))
        return int(num_trained), int(num_tokens)

    def _gradients(self, batches: Sequence[Batch], num_trained: int) -> list[Tensor]:
        """Leave this process's gradient, and return its part of the loss by micro-batch."""
        if not self.ranks.takes_steps:
            self.optimizer.zero_grad(set_to_none=True)
            losses = [self._backward(batch.to(self._device), num_trained) for batch in batches]
            self.ranks.sum_gradients(self._parameters)
            return losses
        num_pieces = [-(-len(batch.targets) // HEAD_ROWS) for batch in batches]
        most = self.ranks.largest(max(num_pieces)) if self.ranks.partitions_weights else 0
        return [
            self.ranks.backward(place == len(batches), batch.to(self._device), num_trained, most or pieces)
            for place, (batch, pieces) in enumerate(zip(batches, num_pieces, strict=True), 1)
        ]

    def _loss(self, batch: Batch, num_trained: int, num_pieces: int) -> Tensor:
        """This micro-batch's part of the loss as one graph, for engines that run the backward pass themselves.

        The logits of the `num_pieces` pieces are computed again in the backward pass, so that one piece's are kept.
        """
        with self.precision():
            hidden = self._hidden(batch)
            tensors = (hidden, batch.targets, batch.weights)
            pieces = zip(*(tensor.tensor_split(num_pieces) for tensor in tensors), strict=True)
            losses = [checkpoint(self._cross_entropy, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum() / num_trained

    def _update(self, loss: float, number: int) -> float:
        """Change the weights and return the gradient's norm. Raises NotFiniteError when they were not changed."""
        if self.ranks.takes_steps:
            self._require_finite(loss, 0.0, number)
            grad_norm = self.ranks.step()
            self._require_finite(loss, grad_norm, number)
            return grad_norm
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        self._require_finite(loss, grad_norm, number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy over all trained tokens of `examples`; nan when there are none."""
        total, num_trained = 0.0, 0
        size = self._config.examples_per_step
        with quiet(self.model), self.precision():
            for start in range(0, len(examples), size):
                for batch in self._batches(examples[start : start + size]):
                    num_trained += batch.num_trained_tokens
                    total += self._sum_of(batch.to(self._device))
        total, num_trained = self.ranks.sums(total, num_trained)
        return total / num_trained if num_trained else math.nan

    def _sum_of(self, batch: Batch) -> float:
        """Sum of cross-entropy over the trained tokens of a batch."""
        if self.ranks.partitions_weights:  # as many calls of the head in every process
            return float(self._cross_entropy(self._hidden(batch), batch.targets, batch.weights))
        return sum(float(self._cross_entropy(*piece)) for piece in _pieces(self._hidden(batch), batch))

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to the run's dtype; the float32 weights that learn are cast as they are used."""
        with ExitStack() as stack:
            if self._dtype != torch.float32:
                stack.enter_context(torch.autocast(self._device.type, dtype=self._dtype))
                if is_adapter(self.model):  # PEFT would cast inputs up to the adapter's float32 first
                    stack.enter_context(disable_input_dtype_casting(self.model))
            yield

    def _backward(self, batch: Batch, num_trained: int) -> Tensor:
        """Add this micro-batch's part of the step's gradient and return its part of the loss.

        The head runs in pieces on detached positions, so the logits of one piece are all that is ever kept; the
        gradient that the pieces leave there then flows through the rest of the model once.
        """
        with self.precision():
            hidden = self._hidden(batch)
            below = hidden.detach().requires_grad_(hidden.requires_grad)
            losses = []
            for piece in _pieces(below, batch):
                loss = self._cross_entropy(*piece) / num_trained
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
        if hidden.requires_grad:
            hidden.backward(below.grad)
        return torch.stack(losses).sum()

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        size, data = self.micro_batch_size, self._config.data
        place = (self.ranks.rank, self.ranks.world)
        if self.packing == "tree":
            return make_tree_batches(examples, data.max_length, size, self._pad_id, place)
        return make_batches(examples, self.packing, data.max_length, size, self._pad_id, place)

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head is asked about: (trained tokens, hidden size), or their logits where the head is not apart."""
        if self.traits.splits_head:
            states = self._core.get_decoder()(**self._inputs(batch)).last_hidden_state
        else:
            states = self._core(**self._inputs(batch)).logits
        return states.flatten(0, 1)[batch.places]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        mask = batch.mask
        if mask is not None and self._core.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(self._dtype).min)
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": mask,
            "use_cache": False,
        }

    def _cross_entropy(self, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over targets, each as often as it has weight."""
        logits = self._core.get_output_embeddings()(states) if self.traits.splits_head else states
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights).sum()  # not a product of vectors: autocast would make that bfloat16

    def _clip(self) -> float:
        limit = self._config.train.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(self._parameters, limit))

    def _require_finite(self, loss: float, grad_norm: float, number: int) -> None:
        overflow = self._dtype == torch.float16 and math.isfinite(loss)  # the scaler skips the step by itself
        if math.isfinite(loss) and (math.isfinite(grad_norm) or overflow):
            return
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
        raise NotFiniteError(
            f"Training broke down at step {number}: {what}. The step was not taken; earlier checkpoints are unharmed.",
            f"Try a smaller train.learning_rate (now {self._config.train.learning_rate:g}), more warmup_steps, or "
            "model.dtype float32, and look at the rows of this step.",
        )

    @torch.no_grad()
    def _find_traits(self) -> Traits:
        """Try on a few tokens what no architecture's code promises."""
        first, second = Example([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), Example([1, 2, 7, 8, 9], [1, 2, 7, 8, 9])
        alone, packed = collate([[second]], 0), collate([[first, second]], 0)
        tree = make_tree_batches([first, second], 64, 1, 0)[0]
        with quiet(self.model), self.precision():
            whole = self._logits(alone)[0]
            return Traits(
                splits_head=_has_parts(self._core) and _close(self._split_logits(alone)[0], whole),
                isolates_packed=_close(self._logits(packed)[0, -5:], whole),
                follows_trees=self._tree_is_close(tree, whole[:4]),
            )

    def _tree_is_close(self, tree: Batch, expected: Tensor) -> bool:
        """Whether the nodes of the second example, 1 2 (shared) 7 8, have its logits."""
        try:
            return _close(self._logits(tree)[0, [0, 1, 5, 6]], expected)
        except (RuntimeError, ValueError, TypeError, IndexError):  # an architecture that takes no such mask
            return False

    def _choose_packing(self) -> str:
        """How examples are laid out: as the config says, where this model computes the same gradient that way."""
        pack = self._config.data.pack
        if pack == "tree" and not (self.traits.follows_trees and self._sees_everything()):
            pack = "sequence"
            print("This model's attention cannot follow a tree, so examples are packed as sequences.", flush=True)
        if pack == "sequence" and not self.traits.isolates_packed:
            pack = "none"
            print("This model lets packed examples see each other, so they are padded (pack: none).", flush=True)
        return pack

    def _sees_everything(self) -> bool:
        """Whether attention reaches back over the longest example; a mask of our own would switch a window off."""
        windows = (getattr(self._core.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return all(window is None or window >= self._config.data.max_length for window in windows)

    def _logits(self, batch: Batch) -> Tensor:
        return self._core(**self._inputs(batch.to(self._device))).logits

    def _split_logits(self, batch: Batch) -> Tensor:
        states = self._core.get_decoder()(**self._inputs(batch.to(self._device)))
        return self._core.get_output_embeddings()(states.last_hidden_state)


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


def make_optimizer(parameters: list[nn.Parameter], train: TrainSection, device: torch.device) -> Any:
    """AdamW, or its 8-bit kin of bitsandbytes. Raises ConfigError where that cannot run."""
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    arguments = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2)}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    if train.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        raise _optimizer_error(train.optimizer, "pages between GPU and CPU memory, and there is no GPU here")
    try:
        from bitsandbytes import optim  # imported here: it costs seconds, and few runs need it

        kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
        return kind(groups, **arguments)
    except (ImportError, RuntimeError, OSError) as error:
        raise _optimizer_error(train.optimizer, f"cannot run here: {' '.join(str(error).split())[:200]}") from error


def _optimizer_error(name: str, reason: str) -> ConfigError:
    return ConfigError([Problem("train.optimizer", f"{name} {reason}", "adamw")])


def _pieces(states: Tensor, batch: Batch) -> Iterator[tuple[Tensor, ...]]:
    """States, targets and weights in pieces small enough for the head."""
    tensors = (states, batch.targets, batch.weights)
    return zip(*(tensor.split(HEAD_ROWS) for tensor in tensors), strict=True)


def _has_parts(core: nn.Module) -> bool:
    decoder = core.get_decoder() if hasattr(core, "get_decoder") else None
    return decoder is not None and decoder is not core and core.get_output_embeddings() is not None


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: a leak or a missing scale differs by far more than a hundredth, also in bfloat16."""
    return bool((one.float() - other.float()).norm() <= 0.02 * other.float().norm())
