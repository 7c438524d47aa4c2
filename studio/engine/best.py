"""Which checkpoint is the best one so far, and whether it is time to stop because nothing gets better."""

from dataclasses import asdict, dataclass
from typing import Any

from studio.config.schema import RunConfig

HIGHER_IS_BETTER = {"valid_loss": False, "probe_score": True}


@dataclass
class Best:
    """The best score of a run by the measure that its config names ("none": there is no best).

    `waited` counts measurements since then; at `patience` of them (0: never) the run is to stop.
    """

    measure: str
    patience: int
    step: int = -1
    value: float | None = None
    waited: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> "Best":
        return cls(config.record.best_by, config.train.early_stop_patience)

    def see(self, measure: str, step: int, value: float) -> bool:
        """Take a measurement; whether it is the best so far. One that is not finite, or another measure, is not.

        Before the first step there is nothing to save: its value is a mark to beat, not a checkpoint.
        """
        if measure != self.measure or value != value:
            return False
        if self.value is not None and not self._better(value):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return step > 0

    @property
    def should_stop(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    @property
    def kept(self) -> tuple[int, ...]:
        """The step whose checkpoint must stay."""
        return (self.step,) if self.step > 0 else ()

    def why_stopped(self) -> str:
        return (
            f"Stopped early: {self.waited} measurements of {self.measure.replace('_', ' ')} in a row were no better "
            f"than {self.value:.4g} at step {self.step}."
        )

    def stop_detail(self) -> dict[str, Any]:
        """The same in numbers, for a sentence in any language."""
        return {"waited": self.waited, "value": self.value, "best_step": self.step}

    def state(self) -> dict[str, Any]:
        """What counts on over a resume."""
        return {name: value for name, value in asdict(self).items() if name not in ("measure", "patience")}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _better(self, value: float) -> bool:
        return value > self.value if HIGHER_IS_BETTER[self.measure] else value < self.value  # type: ignore[operator]
