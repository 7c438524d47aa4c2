"""Do two forms of one model say the same? Logits and greedy answers of a few probes, in figures."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.engine.chat import prompt_ids
from studio.engine.generate import generate, quiet
from studio.engine.models.load import LoadedModel
from studio.errors import DataError

PROBES = (
    "Who are you?",
    "Who made you?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How much is 17 plus 25?",
    "你是谁？",
    "Name three colours.",
    "Translate to French: good morning.",
)
ANSWER_TOKENS = 24
# Root mean square of the logits' difference over that of the logits. Measured on the starter with a LoRA of 12 steps:
# folded 3e-6, rounded to float16 0.0016, to bfloat16 0.069; the base without its adapter 0.8. One layer left out of 210
# is 0.005, less than bfloat16's own rounding, so the folding is checked in float32, before anything is rounded.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# Greedy answers flip where rounding moves two logits past each other, and with 8 bits some always do. A flip is excused
# only where the reference's lead was within three standard deviations of what this file moves two logits apart by. The
# measured error widens that, and so a worse file is excused more; yet never more than its tolerance allows, for a
# larger error fails by itself. What rounding could hide all the same (one layer's update, a scale of 2 %, a
# small adapter left out) is seen elsewhere: by `folding_error`, and in the tensors of the file (engine/weighing.py).
DEVIATIONS = 3
NOT_TOLD = float("-inf")
"""In place of a log-probability that a tool did not tell, being among the least likely."""


@dataclass(frozen=True)
class Reference:
    """Probes with the greedy answers of one form. `logits[i]`: (answer tokens + 1, vocabulary), float32, on the CPU.

    `ends`: the tokens that end an answer.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Tensor]
    ends: tuple[int, ...] = ()

    @property
    def num_positions(self) -> int:
        """Tokens of the longest text, and the one after it."""
        return max(len(p) + len(a) + 1 for p, a in zip(self.prompts, self.answers, strict=True))


@dataclass(frozen=True)
class Agreement:
    """How far another form is from the reference.

    Of `num_answers` greedy answers `same_answers` are equal token for token; `near_ties` differ only where the
    reference itself held two tokens for equally likely, within what rounding to this format moves a logit.
    """

    relative_error: float
    tolerance: float
    max_abs_difference: float
    same_tokens: float
    same_answers: int
    near_ties: int
    num_answers: int
    folding_error: float | None = None
    """Relative error before the weights were rounded; None where memory was too short for float32."""

    @property
    def is_folded(self) -> bool:
        return self.folding_error is None or self.folding_error <= TOLERANCE[torch.float32]

    @property
    def verified(self) -> bool:
        answers = self.same_answers + self.near_ties == self.num_answers
        return self.is_folded and answers and self.relative_error <= self.tolerance

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def make_reference(loaded: LoadedModel, model: nn.Module) -> Reference:
    """Ask `model` (`loaded` with or without an adapter on it) the probes, and keep the logits of its answers."""
    prompts = probe_prompts(loaded)
    answers = generate(
        model, prompts, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, max_new_tokens=ANSWER_TOKENS
    )  # fmt: skip
    pairs = list(zip(prompts, answers, strict=True))
    logits = [answer_logits(model, prompt, answer) for prompt, answer in pairs]
    return Reference(prompts, answers, logits, tuple(loaded.eos_ids))


def probe_prompts(loaded: LoadedModel) -> list[list[int]]:
    """Ids of the chats that ask the probes."""
    return [_prompt(loaded, text) for text in PROBES]


def compare(loaded: LoadedModel, reference: Reference, stored: torch.dtype) -> Agreement:
    """Read the reference's answers with another model; `stored` is the format that its weights were rounded to.

    A greedy answer is the same exactly when the most likely token is the same at each of its places.
    """
    pairs = zip(reference.prompts, reference.answers, strict=True)
    found = [answer_logits(loaded.model, prompt, answer) for prompt, answer in pairs]
    return agreement(found, reference.logits, TOLERANCE.get(stored, TOLERANCE[torch.bfloat16]))


def agreement(found: list[Tensor], expected: list[Tensor], tolerance: float) -> Agreement:
    """How far logits are from those expected; for NOT_TOLD ones see there: both sides are log-probabilities then.

    NaN anywhere makes every comparison false, and so nothing verified.
    """
    both, ours = torch.cat(expected), torch.cat(found)
    differences = (ours - both)[~torch.isneginf(ours)]
    scale = (both - both.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = differences.square().mean().sqrt()
    # A lead within three standard deviations of what rounding moves two logits apart by is as good as none.
    near = torch.maximum(tolerance * scale, DEVIATIONS * math.sqrt(2) * error)
    losses = [_lost_lead(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    same = sum(bool((loss == 0).all()) for loss in losses)
    excusable = sum(bool((loss <= near).all()) for loss in losses)
    return Agreement(
        relative_error=float(error / scale),
        tolerance=tolerance,
        max_abs_difference=float(differences.abs().max()),
        same_tokens=float((torch.cat(losses) == 0).float().mean()),
        same_answers=same,
        near_ties=excusable - same,
        num_answers=len(losses),
    )


def _lost_lead(ours: Tensor, theirs: Tensor) -> Tensor:
    """By how much `theirs` preferred its own choice to ours, for each token; 0 where the choices are one."""
    return theirs.amax(-1) - theirs.gather(-1, ours.argmax(-1, keepdim=True)).squeeze(-1)


def answer_logits(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits for each token of the answer and the one after it: (len(answer) + 1, vocabulary), on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + answer], device=device)
    with torch.no_grad(), quiet(model):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(prompt) - 1 :].float().cpu()


def _prompt(loaded: LoadedModel, text: str) -> list[int]:
    """The probe as the chat template asks it; as plain text where the template wants something else."""
    try:
        return prompt_ids(loaded, [{"role": "user", "content": text}])
    except DataError:
        return loaded.tokenizer.encode(text)
