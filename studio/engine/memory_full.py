"""Out of memory: the same step again in smaller micro-batches. The gradient of a step does not depend on the split."""

import gc
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from studio.errors import StudioError

if TYPE_CHECKING:  # what it computes with asks this module what an error means
    from studio.engine.loop import Trainer

Result = TypeVar("Result")
SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class MemoryFullError(StudioError):
    """A step does not fit into memory; the message says what does."""


class OneTooLargeError(MemoryFullError):
    """One example at a time is too much. Nothing came of what was tried: weights are as they were."""


def is_memory_full(error: BaseException) -> bool:
    """Whether torch, CUDA or Python could not get memory; many allocators raise a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in SAYINGS)


def until_it_fits(trainer: "Trainer", call: Callable[[], Result]) -> Result:
    """What `call` returns, with trainer.micro_batch_size halved until it fits: in all processes, when one is short.

    Raises OneTooLargeError when one example at a time is too much, MemoryFullError when a step cannot be taken again:
    once the optimizer has begun, some weights may have changed, and would change twice.
    """
    while True:
        trainer.ranks.begin_try()
        try:
            return call()
        except (RuntimeError, MemoryError) as error:
            if not is_memory_full(error):
                raise
            reason = _reason(error)
        free_memory(trainer)  # only here: while the error is handled, its frames hold on to their tensors
        if not trainer.ranks.all_try_again():
            raise _cannot_try_again(trainer, reason)
        if trainer.micro_batch_size == 1:
            raise OneTooLargeError(
                f"Out of memory with one example at a time ({reason}).",
                "Try train.gradient_checkpointing, a smaller data.max_length, method qlora or a smaller base model.",
            )
        trainer.micro_batch_size //= 2


def _reason(error: BaseException) -> str:
    """What the allocator says, without the place in its source."""
    said = re.sub(r"^\[enforce fail [^]]*\] .*?: ", "", " ".join(str(error).split()))
    return said.partition(" Error code")[0][:160].rstrip(". ") or type(error).__name__


def _cannot_try_again(trainer: "Trainer", reason: str) -> MemoryFullError:
    if trainer.ranks.takes_steps:
        return MemoryFullError(
            f"Out of memory with train.micro_batch_size {trainer.micro_batch_size} ({reason}), where processes that "
            "share out their weights cannot try again together.",
            "Try a smaller train.micro_batch_size with more gradient_accumulation_steps, or "
            "train.gradient_checkpointing.",
        )
    return MemoryFullError(
        f"Out of memory while the weights were being changed ({reason}). Some of them may have changed already, so the "
        "step is not taken again; earlier checkpoints are unharmed.",
        "A smaller micro-batch does not help there: try train.optimizer adamw_8bit, a lower lora.rank, method lora "
        "instead of full, or a smaller base model.",
    )


def what_fits(wanted: int, fitting: int, number: int, step: int) -> MemoryFullError:
    """The error of a run that may not change its micro-batch, once one of `fitting` rows was tried and did fit.

    `number` of them are the rows of a step. Raised once the step is saved.
    """
    saved = f" Step {step} was computed in smaller ones and is saved; a resume goes on so." if step else ""
    return MemoryFullError(
        f"Out of memory at step {step} with train.micro_batch_size {wanted}.{saved}",
        f"train.micro_batch_size {fitting} with gradient_accumulation_steps {number} fits here "
        "(tried on this step) and gives the same result; train.on_out_of_memory smaller_micro_batch makes the change "
        "by itself. gradient_checkpointing or qlora need less memory, too.",
    )


def free_memory(trainer: "Trainer") -> None:
    """Give back what a step that broke off holds."""
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
