"""A GGUF file read back: by llama.cpp where that is installed, else by transformers, which unpacks it."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, quants

from studio.data.template import ChatTemplate
from studio.data.tokens import TextTokenizer
from studio.engine.equality import PROBES, Reference, agreement, answer_logits
from studio.engine.equivalence import Expected, Verdict, other_prompts
from studio.engine.folding import FoldedWeights
from studio.engine.gguf import llama_cpp, writer
from studio.engine.weighing import ALLOWED, Read, Weighed, weigh
from studio.errors import DataError

ENDS = ("eos", "eot", "eom")
"""Names of the tokens that a file may end an answer with."""
# Relative errors of the logits, as in equality.TOLERANCE: about twice the largest measured on the starter, bare
# and trained (benchmarks/results/exports.md). With k-quants they tell little, for so much rounding moves more than most
# damage does; that nothing but rounding happened is seen in the tensors (engine/weighing.py).
TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 1e-1, "q8_0": 1e-1, "q6_k": 0.35, "q5_k_m": 0.5, "q4_k_m": 0.4}


def verdict_of_file(path: Path, expected: Expected, form: str, threads: int) -> Verdict:
    """Read the file back and hold it against what was expected."""
    if llama_cpp.is_installed():
        return _by_llama_cpp(path, expected.reference, TOLERANCE[form], threads)
    return _by_transformers(path, expected.reference, TOLERANCE[form], expected.tokenizer)


def _by_llama_cpp(path: Path, expected: Reference, tolerance: float, threads: int) -> Verdict:
    runtime = llama_cpp.open_file(path, expected, threads)
    try:
        pairs = zip(expected.prompts, expected.answers, strict=True)
        found = [runtime.answer_logits(prompt, answer) for prompt, answer in pairs]
        prompts = [runtime.prompt(question) for question in PROBES]
    finally:
        runtime.close()
    wanted = [logits.log_softmax(-1) for logits in expected.logits]
    return Verdict(
        runtime.name, agreement(found, wanted, tolerance), other_prompts(expected, prompts),
        Facts(path).lacking_ends(expected),
    )  # fmt: skip


def _by_transformers(path: Path, expected: Reference, tolerance: float, tokenizer: TextTokenizer) -> Verdict:
    from transformers import AutoModelForCausalLM, GgufConfig, __version__

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    pairs = zip(expected.prompts, expected.answers, strict=True)
    found = [answer_logits(model, prompt, answer) for prompt, answer in pairs]
    facts = Facts(path)
    return Verdict(
        f"transformers {__version__}, which unpacks it; llama.cpp is not installed",
        agreement(found, expected.logits, tolerance),
        other_prompts(expected, [facts.prompt(question, tokenizer) for question in PROBES]),
        facts.lacking_ends(expected),
    )


def weigh_file(path: Path, weights: FoldedWeights, form: str) -> Weighed:
    """Every tensor of the file, unpacked, against what was to be written; one that is not there counts as zeros."""
    stored = {each.name: each for each in GGUFReader(path).tensors}
    plan = writer.plan_of(weights, writer.FORMATS["f32"])
    reads = (
        Read(target, _unpacked(stored.get(target), shape), writer.values_of(weights, name),
             writer.before(weights, name))
        for target, (name, shape, _) in plan.items()
    )  # fmt: skip
    return weigh(reads, ALLOWED[form])


def _unpacked(tensor: ReaderTensor | None, shape: torch.Size) -> torch.Tensor:
    if tensor is None or tensor.n_elements != shape.numel():
        return torch.zeros(shape)
    return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)


class Facts:
    """What a file says beside its weights."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        found = self.value("tokenizer.ggml.tokens")
        self.tokens: list[str] = found if isinstance(found, list) else []

    def value(self, key: str) -> Any:
        """One entry, None where there is none."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def prompt(self, question: str, tokenizer: TextTokenizer) -> list[int]:
        """A chat by the file's own template, and by its own tokens: no ids when they are not the model's."""
        template = ChatTemplate(str(self.value("tokenizer.chat_template") or ""), self._special_tokens())
        try:
            text = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        except DataError:
            return []
        ids = tokenizer.encode(text)
        return ids if all(tokenizer.token_id(self.tokens[each]) == each for each in ids) else []

    def lacking_ends(self, expected: Reference) -> tuple[str, ...]:
        """Tokens that end an answer and that the file does not name as such; it has room for three."""
        known = {self.value(f"tokenizer.ggml.{name}_token_id") for name in ENDS}
        return tuple(self.tokens[end] for end in expected.ends[: len(ENDS)] if end not in known)

    def _special_tokens(self) -> dict[str, str]:
        ids = {name: self.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return {f"{name}_token": self.tokens[number] for name, number in ids.items() if isinstance(number, int)}
