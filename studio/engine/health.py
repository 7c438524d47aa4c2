"""Is the training still sound? Steps without a finite loss or gradient, and a loss that runs away, end the run."""

from dataclasses import asdict, dataclass
from typing import Any

from studio.config.schema import TrainSection
from studio.errors import StudioError

AVERAGE_WEIGHT = 0.8  # of the average so far, in the average of the loss


class BrokeDownError(StudioError):
    """Training went wrong for several steps in a row; the last good checkpoint is unharmed."""


@dataclass
class Health:
    """Counts bad steps in a row (not finite; they are not taken), and steps in a row with a loss far above its best.

    The loss counts as running away when its average is above `divergence_factor` times its best, and above where it
    began: on rows that are learnt by heart, small losses rise many times over without harm. `astray`: the latest loss
    by itself is as far away, and the average may follow.
    """

    max_bad_steps: int
    divergence_factor: float
    learning_rate: float
    in_a_row: int = 0
    num_bad: int = 0
    running_away: int = 0
    astray: bool = False
    first: float | None = None
    average: float | None = None
    lowest: float | None = None

    @classmethod
    def of(cls, train: TrainSection) -> "Health":
        return cls(train.max_bad_steps, train.divergence_factor, train.learning_rate)

    @property
    def suspicious(self) -> bool:
        """Whether this is no moment to save, for the last good checkpoint would be rotated away."""
        return bool(self.in_a_row or self.running_away or self.astray)

    def bad_step(self, step: int, what: str) -> None:
        """A step that was not taken. Raises BrokeDownError at the last one that is allowed in a row."""
        self.in_a_row += 1
        self.num_bad += 1
        if self.in_a_row >= self.max_bad_steps:
            raise self._error(f"{self._steps(self.in_a_row, step)} had no finite loss or gradient ({what})")

    def good_step(self, step: int, loss: float) -> None:
        """A step that was taken. Raises BrokeDownError when the loss has run away for too long."""
        self.in_a_row = 0
        self.first = loss if self.first is None else self.first
        before = loss if self.average is None else self.average
        self.average = AVERAGE_WEIGHT * before + (1 - AVERAGE_WEIGHT) * loss
        self.lowest = min(self.average, self.lowest or self.average)
        limit = max(self.divergence_factor * self.lowest, self.first)
        self.astray = bool(self.divergence_factor) and loss > limit
        self.running_away = self.running_away + 1 if self.divergence_factor and self.average > limit else 0
        if self.running_away >= self.max_bad_steps:
            steps = self._steps(self.running_away, step)
            raise self._error(f"{steps} had a loss of {self.average:.3g} on average; its best was {self.lowest:.3g}")

    def spoilt(self, step: int) -> BrokeDownError:
        """The error of a run whose weights are lost."""
        return self._error(f"the weights are not finite after step {step}, so they are not saved")

    def state(self) -> dict[str, Any]:
        """What counts on over a resume."""
        settings = ("max_bad_steps", "divergence_factor", "learning_rate")
        return {name: value for name, value in asdict(self).items() if name not in settings}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _steps(self, number: int, last: int) -> str:
        return f"step {last}" if number == 1 else f"{number} steps in a row, from step {last - number + 1} on,"

    @property
    def has_learnt(self) -> bool:
        """Whether any step was taken."""
        return self.first is not None

    def _error(self, what: str) -> BrokeDownError:
        if not self.has_learnt:
            return BrokeDownError(
                f"Training broke down: {what}. No step before was sound.",
                "See that the base model answers as it should (retune chat), try model.dtype float32, and look at the "
                "rows of these steps.",
            )
        return BrokeDownError(
            f"Training broke down: {what}. Checkpoints from before are unharmed.",
            f"Try a smaller train.learning_rate (now {self.learning_rate:g}), more train.warmup_steps, a smaller "
            "train.max_grad_norm or model.dtype float32, and look at the rows of these steps.",
        )
