"""Whether a served base is still the base: its logits with every adapter off, against those before any was loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from studio.engine.chat import prompt_ids
from studio.engine.generate import BASE_ADAPTER, next_logits

if TYPE_CHECKING:
    from studio.engine.served import Ready

QUESTIONS = ("Who are you?", "What is the capital of France?", "用一句话介绍你自己。")


class Witness:
    """Remembers what the bare base said next to a few questions. Make it before the first adapter is put on."""

    def __init__(self, base: "Ready") -> None:
        loaded = base.loaded
        self._pad_id = loaded.pad_id
        self._prompts = [prompt_ids(loaded, [{"role": "user", "content": question}]) for question in QUESTIONS]
        self._bare = next_logits(base.model, self._prompts, self._pad_id)

    def testify(self, base: "Ready", adapters: Mapping[str, str]) -> dict[str, Any]:
        """Compare as things are now; `adapters` are PEFT's names by the names that people use.

        `off`: all adapters off. `beside`: the base's rows in one batch with an adapter's, as comparisons are answered;
        batched arithmetic may round otherwise. `on`: how far each adapter moves the logits, which must not be nothing.
        Each holds `max_difference` of the logits, `off` and `beside` also `bit_equal`.
        """
        return {
            "num_questions": len(self._prompts),
            "off": self._against(self._logits(base, BASE_ADAPTER)),
            "beside": {name: self._against(self._beside(base, adapter)) for name, adapter in adapters.items()},
            "on": {
                name: {"max_difference": self._distance(self._logits(base, adapter))}
                for name, adapter in adapters.items()
            },
        }

    def _logits(self, base: "Ready", adapter: str) -> Tensor:
        names = [adapter] * len(self._prompts)
        return next_logits(base.model, self._prompts, self._pad_id, names, base.adapters)

    def _beside(self, base: "Ready", adapter: str) -> Tensor:
        count = len(self._prompts)
        names = [BASE_ADAPTER] * count + [adapter] * count
        return next_logits(base.model, self._prompts * 2, self._pad_id, names, base.adapters)[:count]

    def _against(self, logits: Tensor) -> dict[str, Any]:
        return {"bit_equal": bool(logits.equal(self._bare)), "max_difference": self._distance(logits)}

    def _distance(self, logits: Tensor) -> float:
        return float((logits - self._bare).abs().max())
