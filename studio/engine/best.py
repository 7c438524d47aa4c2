"""Which checkpoint is the best one so far, and whether it is time to stop because nothing gets better."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from studio.config.schema import RunConfig

HIGHER_IS_BETTER = {"valid_loss": False, "probe_score": True, "probe_balance": True}
IN_A_ROW = 2  # one measurement of a few questions may be luck
CONFIGURED = ("measure", "patience", "identity", "forgetting")


def score_of(measured: dict[str, float]) -> float:
    """Identity minus leakage: 1 is a model that says who it is when asked, and only then."""
    return measured.get("probe/identity", 0.0) - measured.get("probe/leakage", 0.0)


@dataclass
class Best:
    """The best score of a run by the measure that its config names ("none": there is no best), and when it is enough.

    `waited` counts measurements since the best; at `patience` of them (0: never) the run is to stop. It is, too, when
    IN_A_ROW measurements of held-out questions say that it knows who it is (`identity`, a share), or that it forgot
    (`forgetting`, growth of perplexity); 0 asks for neither. `learnt` and `forgot` count those.
    """

    measure: str
    patience: int
    identity: float = 0.0
    forgetting: float = 0.0
    step: int = -1
    value: float | None = None
    waited: int = 0
    learnt: int = 0
    forgot: int = 0
    latest: float = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> "Best":
        train = config.train
        return cls(config.record.best_by, train.early_stop_patience, train.stop_at_identity, train.stop_at_forgetting)

    def see(self, measure: str, step: int, value: float) -> bool:
        """Take a measurement; whether it is the best so far. One that is not finite never is, nor another measure.

        Before the first step there is nothing to save: its value is a mark to beat, not a checkpoint.
        """
        if measure != self.measure:
            return False
        if not math.isfinite(value) or self.value is not None and not self._better(value):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return step > 0

    def probed(self, step: int, measured: dict[str, float]) -> bool:
        """Take what held-out questions say, {"probe/identity", "probe/leakage", "probe/retention"}; whether it is the
        best so far. Before the first step nothing is learnt or forgotten."""
        if step > 0:
            self._see_targets(measured.get("probe/identity"), measured.get("probe/retention"))
        score = score_of(measured)
        scores = {"probe_score": score, "probe_balance": score - max(0.0, measured.get("probe/retention", 0.0))}
        return any([self.see(name, step, value) for name, value in scores.items()])

    def _see_targets(self, identity: float | None, growth: float | None) -> None:
        if self.identity and identity is not None:
            self.learnt = self.learnt + 1 if identity >= self.identity else 0
            self.latest = identity if self.learnt else self.latest
        if self.forgetting and growth is not None:
            self.forgot = self.forgot + 1 if growth > self.forgetting else 0
            self.latest = growth if self.forgot else self.latest

    @property
    def reason(self) -> str:
        """Why the run is to stop: learnt, forgot, patience; "" while it is not."""
        if self.forgot >= IN_A_ROW:
            return "forgot"
        if self.learnt >= IN_A_ROW:
            return "learnt"
        return "patience" if self.patience and self.waited >= self.patience else ""

    @property
    def should_stop(self) -> bool:
        return bool(self.reason)

    @property
    def kept(self) -> tuple[int, ...]:
        """The step whose checkpoint must stay."""
        return (self.step,) if self.step > 0 else ()

    def why_stopped(self) -> str:
        if self.reason == "learnt":
            return f"Stopped early: it answers {self.latest:.0%} of the held-out identity questions, as was asked for."
        if self.reason == "forgot":
            return (
                f"Stopped early: its perplexity on what the base knew has grown by {self.latest:.0%}, more than the "
                f"{self.forgetting:.0%} allowed."
            )
        measured = f"Stopped early: {self.waited} measurements of {self.measure.replace('_', ' ')} in a row were"
        if self.value is None:
            return f"{measured} not finite."
        return f"{measured} no better than {self.value:.4g} at step {self.step}."

    def stop_detail(self) -> dict[str, Any]:
        """The same in numbers, for a sentence in any language."""
        found = {"reason": self.reason, "latest": self.latest, "allowed": self.forgetting}
        return found | {"waited": self.waited, "value": self.value, "best_step": self.step}

    def state(self) -> dict[str, Any]:
        """What counts on over a resume."""
        return {name: value for name, value in asdict(self).items() if name not in CONFIGURED}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _better(self, value: float) -> bool:
        return value > self.value if HIGHER_IS_BETTER[self.measure] else value < self.value  # type: ignore[operator]
