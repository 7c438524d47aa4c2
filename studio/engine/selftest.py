"""Whether a served base is still the base: its logits with every adapter off, against those before any was loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from studio.engine.chat import prompt_ids
from studio.engine.generate import BASE_ADAPTER, next_logits
from studio.engine.models.load import LoadedModel

QUESTIONS = ("Who are you?", "What is the capital of France?", "用一句话介绍你自己。")


class Witness:
    """Remembers what the bare base said next to a few questions. Make it before the first adapter is put on."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._pad_id = loaded.pad_id
        self._prompts = [prompt_ids(loaded, [{"role": "user", "content": question}]) for question in QUESTIONS]
        self._bare = next_logits(loaded.model, self._prompts, self._pad_id)

    def testify(self, model: nn.Module, adapters: Mapping[str, str]) -> dict[str, Any]:
        """Compare as things are now; `adapters` are PEFT's names by the names that people use.

        `off`: all adapters off. `beside`: the base's rows in one batch with an adapter's, as comparisons are answered;
        batched arithmetic may round otherwise. `on`: how far each adapter moves the logits, which must not be nothing.
        Each holds `max_difference` of the logits, `off` and `beside` also `bit_equal`.
        """
        return {
            "num_questions": len(self._prompts),
            "off": self._against(self._logits(model, BASE_ADAPTER)),
            "beside": {name: self._against(self._beside(model, adapter)) for name, adapter in adapters.items()},
            "on": {
                name: {"max_difference": self._distance(self._logits(model, adapter))}
                for name, adapter in adapters.items()
            },
        }

    def _logits(self, model: nn.Module, adapter: str) -> Tensor:
        return next_logits(model, self._prompts, self._pad_id, [adapter] * len(self._prompts))

    def _beside(self, model: nn.Module, adapter: str) -> Tensor:
        count = len(self._prompts)
        names = [BASE_ADAPTER] * count + [adapter] * count
        return next_logits(model, self._prompts * 2, self._pad_id, names)[:count]

    def _against(self, logits: Tensor) -> dict[str, Any]:
        return {"bit_equal": bool(logits.equal(self._bare)), "max_difference": self._distance(logits)}

    def _distance(self, logits: Tensor) -> float:
        return float((logits - self._bare).abs().max())
