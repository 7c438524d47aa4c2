"""What a run is at a step border: everything that is needed to go on, under a name and a type."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from studio.engine import checkpoint
from studio.errors import CheckpointError, DataError

NOT_CARRIED = "the optimizer's memory, the learning rate's schedule, the place in the data and the random numbers"


@dataclass(frozen=True)
class Schedule:
    """How far the learning rate is on its way."""

    step: int
    num_steps: int
    warmup_steps: int


@dataclass(frozen=True)
class DataPlace:
    """`position`: rows of the mixture that were used; `fingerprints`: sha256 of each source's rows."""

    position: int
    tokens_seen: int
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Counters:
    """What counts on over a resume: the micro-batch in use (it may have been made smaller), bad steps, the best score,
    how many rows of numbers and samples were stored up to the step (the metric cursor), and what a stop left out there
    (evaluation, probes, samples)."""

    micro_batch_size: int = 0
    health: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    owed: tuple[str, ...] = ()

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Counters":
        """Older checkpoints say only whether samples are owed."""
        owed = {"owed": ("samples",)} if content.get("owes_samples") else {}
        return cls(**owed | {name: value for name, value in content.items() if name != "owes_samples"})


@dataclass(frozen=True)
class RunState:
    """A run after a step. `about` names the run, its config, base and versions; the rest is what the arithmetic needs.

    `weights` and `optimizer` are empty where they lie in files of their own (a checkpoint that is a folder).
    """

    about: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    schedule: Schedule
    data: DataPlace
    rng: dict[str, Any]
    counters: Counters

    @property
    def step(self) -> int:
        return self.schedule.step

    def content(self) -> dict[str, Any]:
        """Plain containers and tensors, so that it loads with weights_only."""
        return {
            "meta": {"format": checkpoint.FORMAT, "step": self.step, **self.about},
            "state_dict": self.weights,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "schedule": asdict(self.schedule),
            "data": asdict(self.data),
            "rng": self.rng,
            "counters": asdict(self.counters),
        }

    @classmethod
    def read(cls, content: dict[str, Any]) -> "RunState":
        """The state in a checkpoint's content. Raises CheckpointError when a part is missing or is something else."""
        try:
            return cls(
                about={key: value for key, value in content["meta"].items() if key not in ("format", "step")},
                weights=content["state_dict"],
                optimizer=content["optimizer"],
                scaler=content["scaler"],
                schedule=Schedule(**content["schedule"]),
                data=DataPlace(**content["data"]),
                rng=content["rng"],
                counters=Counters.read(content.get("counters", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The checkpoint is incomplete: {type(error).__name__} {error}.", "Resume from the one before it."
            ) from error

    def require_same_run(self, expected: "RunState") -> None:
        """Resuming on other data, weights or length would not be the same run. Raises CheckpointError or DataError.

        `expected` is this run's state as it would be at the same step.
        """
        run_id, wanted = self.about["run_id"], expected.about["run_id"]
        if run_id != wanted:
            raise CheckpointError(
                f"The checkpoint is one of run {run_id!r}, not of {wanted!r}.",
                f"Choose one of {wanted}, or resume {run_id}.",
            )
        self._require_same_base(expected)
        here = expected.data.fingerprints
        if changed := [name for name, print_ in self.data.fingerprints.items() if here.get(name) != print_]:
            raise DataError(
                f"The dataset {', '.join(changed)} changed since the checkpoint was saved, so the run cannot go on.",
                "Put the old data back, or start a new run from its weights (--continue-from).",
            )
        if self.schedule != expected.schedule or self.data.position != expected.data.position:
            raise CheckpointError(
                f"The checkpoint is of a run of {self.schedule.num_steps} steps, at row {self.data.position} of its "
                f"data; this run is one of {expected.schedule.num_steps} steps, and would be at row "
                f"{expected.data.position}.",
                "Put the run's config back as it was, or start a new run from its weights (--continue-from).",
            )

    def _require_same_base(self, expected: "RunState") -> None:
        """Raises CheckpointError unless the weights belong to the base and the method of `expected`."""
        ours, theirs = self.about, expected.about
        if ours["method"] != theirs["method"] or ours["base_fingerprint"] != theirs["base_fingerprint"]:
            raise CheckpointError(
                f"The checkpoint was trained with {ours['method']} on another base than this run's config says.",
                "Use the method and the base model that it was trained with.",
            )
