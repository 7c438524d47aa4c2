"""What a training run leaves in the project's database: numbers, samples, how far it is."""

from pathlib import Path

import torch

from studio.engine.devices import memory_metric
from studio.engine.loop import StepResult
from studio.store import metrics, open_db, runs, samples
from studio.store.samples import Sample


class Recorder:
    """Writes for one run; each call is one short transaction or two."""

    def __init__(self, folder: Path, run_id: str, device: torch.device) -> None:
        self._folder = folder
        self._run_id = run_id
        self._device = device

    def begin(self, num_steps: int, step: int) -> None:
        """The run goes on after `step`; what was stored for later steps will be computed again."""
        with open_db(self._folder) as db:
            runs.update(db, self._run_id, num_steps=num_steps, step=step)
            metrics.forget_after(db, self._run_id, step if step else -1)

    def step(self, step: int, result: StepResult) -> None:
        """Numbers of a finished step."""
        values = {
            "train/loss": result.loss,
            "train/learning_rate": result.learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/trained_tokens": float(result.num_trained_tokens),
            "train/tokens_per_second": result.num_tokens / result.seconds,
            **memory_metric(self._device),
        }
        with open_db(self._folder) as db:
            metrics.record(db, self._run_id, step, values)
            runs.update(db, self._run_id, step=step)

    def valid_loss(self, step: int, loss: float) -> None:
        with open_db(self._folder) as db:
            metrics.record(db, self._run_id, step, {"valid/loss": loss})

    def samples(self, step: int, texts: list[Sample]) -> None:
        with open_db(self._folder) as db:
            samples.add(db, texts)

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        with open_db(self._folder) as db:
            return metrics.latest(db, self._run_id)
