"""The gate that every export passes or fails: read back, it must be spoken to and answer as what it was made from.

gate.json beside the files has the verdict and its figures; a failed export is kept, and marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from studio.data.named import Template
from studio.data.tokens import TextTokenizer
from studio.engine.adapter_files import Adapter, read_adapter
from studio.engine.equality import (
    PROBES,
    TOLERANCE,
    Agreement,
    Reference,
    agreement,
    answer_logits,
    compare,
    make_reference,
    probe_prompts,
)
from studio.engine.folding import FoldedWeights, LoadedWeights, StoredWeights, attach, fill
from studio.engine.models.load import load_base
from studio.engine.weighing import ALLOWED, Read, Weighed, weigh

SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Verdict:
    """What came of reading an export back. `read_with`: the program that did.

    `other_prompts`: questions whose chat it renders or tokenises otherwise than in training. `lacking_ends`: tokens
    that end an answer, and that the export does not know as such. `weights`: its tensors against those that were to be
    written; None where they are the trained ones themselves, or are named otherwise than transformers names them.
    """

    read_with: str
    agreement: Agreement
    other_prompts: tuple[str, ...] = ()
    lacking_ends: tuple[str, ...] = ()
    weights: Weighed | None = None

    @property
    def passed(self) -> bool:
        weighed = self.weights is None or self.weights.passed
        return self.agreement.verified and weighed and not self.other_prompts and not self.lacking_ends

    @property
    def message(self) -> str:
        """The verdict in a few sentences."""
        found = self.agreement
        ties = f", and {found.near_ties} differ at a near tie" if found.near_ties else ""
        parts = [
            f"{found.same_answers} of {found.num_answers} greedy answers are the same{ties}",
            f"logits differ by {found.relative_error:.2g} (allowed {found.tolerance:.2g})",
        ]
        if self.weights:
            parts.append(self.weights.message)
        if not found.is_folded:
            parts.append(f"folding alone moves logits by {found.folding_error:.2g}")
        if self.other_prompts:
            parts.append(f"{len(self.other_prompts)} of {found.num_answers} prompts are not the ones it was trained on")
        if self.lacking_ends:
            parts.append(f"{', '.join(self.lacking_ends)} does not end an answer")
        return f"{'Passed' if self.passed else 'Failed'}: {'; '.join(parts)}. Read with {self.read_with}."

    def to_row(self) -> dict[str, Any]:
        """As gate.json has it."""
        return {
            "passed": self.passed,
            "message": self.message,
            "read_with": self.read_with,
            "figures": self.agreement.figures(),
            "weights": self.weights.figures() if self.weights else None,
            "other_prompts": list(self.other_prompts),
            "lacking_ends": list(self.lacking_ends),
            "questions": list(PROBES),
        }


@dataclass(frozen=True)
class Expected:
    """What base and adapter answer to the probes, and how they were spoken to."""

    reference: Reference
    tokenizer: TextTokenizer
    template: Template


def expected_of(
    base: Path, adapter: Adapter | None, dtype: torch.dtype, device: torch.device, bits: int = 0
) -> Expected:
    """Ask base and adapter the probes, as the adapter was trained to be asked. The model is freed again."""
    loaded = load_base(base, dtype=dtype, device=device, bits=bits)
    model = attach(loaded.model, adapter) if adapter else loaded.model
    spoken = loaded.with_template_of(adapter.folder) if adapter else loaded
    return Expected(make_reference(spoken, model), spoken.tokenizer, spoken.template)


def verdict_of_folder(
    folder: Path, expected: Reference, dtype: torch.dtype, device: torch.device, tolerance: float
) -> Verdict:
    """Read a model folder back with transformers."""
    from transformers import __version__

    loaded = load_base(folder, dtype=dtype, device=device)
    pairs = zip(expected.prompts, expected.answers, strict=True)
    found = [answer_logits(loaded.model, prompt, answer) for prompt, answer in pairs]
    lacking = [loaded.tokenizer.decode([end]) for end in expected.ends if end not in loaded.eos_ids]
    return Verdict(
        f"transformers {__version__}", agreement(found, expected.logits, tolerance),
        other_prompts(expected, probe_prompts(loaded)), tuple(lacking),
    )  # fmt: skip


def weigh_folder(folder: Path, weights: FoldedWeights, dtype: torch.dtype) -> Weighed | None:
    """Every tensor of a written model against what it should be; None where its files use names of their own."""
    if not weights.is_streamable:
        return None
    stored = StoredWeights(folder)
    reads = (
        Read(name, stored.read(name) if name in stored.shapes else torch.zeros(shape), weights.read(name),
             weights.before(name))
        for name, shape in weights.shapes.items()
    )  # fmt: skip
    return weigh(reads, ALLOWED[SHORT[dtype]])


def folding_error(
    base: Path, adapter: Adapter, expected: Reference, device: torch.device, squeezed: bool = False
) -> float | None:
    """Of the fold in float32, before any rounding: that would hide a layer that was left out."""
    loaded = load_base(base, dtype=torch.float32, device=device)
    weights = FoldedWeights(base, adapter, squeezed=squeezed, loaded=LoadedWeights(loaded.model))
    if weights.is_parted:  # a model with one tensor for both cannot show it
        return None
    fill(loaded.model, weights)
    return compare(loaded, expected, torch.float32).relative_error


def verdict_of_adapter(base: Path, folder: Path, expected: Reference) -> Verdict:
    """Read an adapter's folder back with PEFT on its base, spoken to as the folder says."""
    from peft import __version__

    loaded = load_base(base, dtype=torch.float32, device=torch.device("cpu"))
    spoken = loaded.with_template_of(folder)
    model = attach(loaded.model, read_adapter(folder))
    pairs = zip(expected.prompts, expected.answers, strict=True)
    found = [answer_logits(model, prompt, answer) for prompt, answer in pairs]
    lacking = [spoken.tokenizer.decode([end]) for end in expected.ends if end not in spoken.eos_ids]
    return Verdict(
        f"peft {__version__}", agreement(found, expected.logits, TOLERANCE[torch.float32]),
        other_prompts(expected, probe_prompts(spoken)), tuple(lacking),
    )  # fmt: skip


def other_prompts(expected: Reference, found: Sequence[list[int]]) -> tuple[str, ...]:
    """The questions whose prompt is not the expected one."""
    pairs = zip(PROBES, expected.prompts, found, strict=True)
    return tuple(question for question, wanted, ids in pairs if wanted != ids)
