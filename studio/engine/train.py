"""The `train` verb: a run from its frozen config to its last checkpoint, with numbers and samples on the way."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.config.schema import RunConfig
from studio.config.yaml import load_config
from studio.data import mix
from studio.data.tokens import Example
from studio.engine import adapters, checkpoint, devices
from studio.engine.batches import Corpus, describe_packing, examples_from, load_corpus
from studio.engine.checkpoint import CheckpointFolder
from studio.engine.job import JobContext
from studio.engine.loop import StepResult, Trainer
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.record import Recorder
from studio.engine.sampling import take_samples
from studio.engine.tokenize import reporting
from studio.errors import CheckpointError, DataError
from studio.models import model_fingerprint, require
from studio.paths import clear_leftovers, inside
from studio.store import open_db, runs


@dataclass
class Requests:
    """What a person asked for and has not got yet; `stop` is "", "save" or "discard"."""

    stop: str = ""
    save: bool = False
    sample: bool = False

    def read(self, job: JobContext) -> None:
        asked = job.requests()
        self.stop = asked.stop_request or self.stop
        self.save |= bool(asked.save_request)
        self.sample |= bool(asked.sample_request)


def run(job: JobContext) -> dict[str, Any]:
    """Train, from the start or on from a checkpoint. args: config (path in the project), resume ("", "auto", path)."""
    started = time.monotonic()
    config = load_config(inside(job.folder, job.args["config"]))
    devices.set_threads()
    devices.seed_all(config.train.seed)
    training = Training.prepare(job, config)
    training.resume(job.args.get("resume", ""))
    training.run()
    result = training.result(round(time.monotonic() - started, 3))
    if training.requests.stop:
        saved = "Stopped on request." if training.requests.stop == "save" else "Stopped on request, without saving."
        job.stopped(result, saved)
    return result


class Training:
    """One run in progress; `step` is the last finished one."""

    def __init__(
        self,
        job: JobContext,
        config: RunConfig,
        loaded: LoadedModel,
        model: nn.Module,
        trainer: Trainer,
        corpus: Corpus,
    ) -> None:
        self.job, self.config = job, config
        self.loaded, self.model, self.trainer, self.corpus = loaded, model, trainer, corpus
        self.requests = Requests()
        self.recorder = Recorder(job.folder, job.run_id, loaded.device)
        run_dir = inside(job.folder, job.args["config"]).parent
        self.checkpoints = CheckpointFolder(job.folder, job.run_id, run_dir, config.record.keep_last)
        self.step, self.num_steps = 0, trainer.num_steps
        self.tokens_seen = 0
        self.saved: Path | None = None
        self._saved_step = self._sampled_step = self._evaluated_step = -1

    @classmethod
    def prepare(cls, job: JobContext, config: RunConfig) -> "Training":
        """Load the model and the data. Raises StudioError, StopRequested."""
        device = devices.pick_device()
        dtype = devices.pick_dtype(config.model.dtype, device)
        job.phase("loading model")
        weights_dtype = torch.float32 if config.method == "full" else dtype
        loaded = load_base(
            require(config.model.base),
            dtype=weights_dtype,
            attention=config.model.attention,
            quantize=config.method == "qlora",
            device=device,
            template=config.data.template,
        )
        job.check_stop()
        job.phase("tokenising", unit="rows")
        with open_db(job.folder) as db:
            versions = runs.get(db, job.run_id).detail.get("datasets")
        corpus = load_corpus(job.folder, config, loaded.template, loaded.tokenizer, reporting(job), versions)
        num_steps = count_steps(corpus, config)
        model = adapters.attach(loaded, config)
        trainer = Trainer(model, config, dtype, num_steps, loaded.pad_id)
        _print_plan(config, corpus, trainer, device, dtype)
        return cls(job, config, loaded, model, trainer, corpus)

    def resume(self, source: str) -> None:
        """Go on from a checkpoint: "" starts anew, "auto" takes the newest sound one, else a path in the project."""
        clear_leftovers(self.checkpoints.run_dir, older_than_seconds=0)  # only this process writes there
        path = self._chosen(source)
        if path:
            self.job.phase(f"resuming from {path.name}")
            self._restore(checkpoint.load_checkpoint(path), path)
        self.recorder.begin(self.num_steps, self.step)

    def run(self) -> None:
        """Train to the last step, or to the border where a person asked to stop."""
        if self.step == 0:
            self._evaluate()
            self._sample()
        steps = examples_from(self.corpus, self.config, self._position_at(self.step))
        self._training_phase()
        while self.step < self.num_steps and not self._stop_asked():
            self._train_step(steps)
            self._at_border()
        if self.requests.stop != "discard":
            self._save()
            if self.step == self.num_steps:
                self._evaluate()
                self._sample()

    def result(self, seconds: float) -> dict[str, Any]:
        """What the job's row keeps."""
        latest = self.recorder.latest()
        relative = str(self.saved.relative_to(self.job.folder.resolve())) if self.saved else ""
        return {
            "steps": self.step,
            "final_loss": latest.get("train/loss"),
            "valid_loss": latest.get("valid/loss"),
            "checkpoint": relative,
            "seconds": seconds,
        }

    def _chosen(self, source: str) -> Path | None:
        if source == "auto":
            found = self.checkpoints.find_resumable()
            for notice in found.notices:
                self.job.phase(notice)
            if found.path is None:
                print("There is no checkpoint to resume from; the run starts at the first step.", flush=True)
            return found.path
        return inside(self.job.folder, source) if source else None

    def _restore(self, saved: dict[str, Any], path: Path) -> None:
        """Put everything where it was: what is computed from here on is the same as without a break."""
        self._require_same_run(saved)
        adapters.load_trainable_state(self.model, saved["state_dict"])
        self.trainer.optimizer.load_state_dict(saved["optimizer"])
        self.trainer.scaler.load_state_dict(saved["scaler"])
        checkpoint.set_rng_state(saved["rng"])
        self.step = saved["meta"]["step"]
        self.tokens_seen = saved["data"]["tokens_seen"]
        self.saved, self._saved_step = path, self.step
        self.checkpoints.go_on_from(self.step, path)

    def _require_same_run(self, saved: dict[str, Any]) -> None:
        """Resuming on other data, weights or length would not be the same run. Raises CheckpointError or DataError."""
        meta = saved["meta"]
        if meta["run_id"] != self.job.run_id:
            raise CheckpointError(
                f"The checkpoint is one of run {meta['run_id']!r}, not of {self.job.run_id!r}.",
                f"Choose one of {self.job.run_id}, or resume {meta['run_id']}.",
            )
        if meta["method"] != self.config.method or meta["base_fingerprint"] != self._base_fingerprint():
            raise CheckpointError(
                f"The checkpoint was trained with {meta['method']} on another base than this run's config says.",
                "Resume with the config and base model that it was trained with.",
            )
        changed = [
            name
            for name, print_ in saved["data"]["fingerprints"].items()
            if self.corpus.fingerprints.get(name) != print_
        ]
        if changed:
            raise DataError(
                f"The dataset {', '.join(changed)} changed since the checkpoint was saved, so the run cannot go on.",
                "Start a new run on the new data, or put the old data back.",
            )
        step = meta["step"]
        if saved["schedule"] != self._schedule_at(step) or saved["data"]["position"] != self._position_at(step):
            raise CheckpointError(
                f"The checkpoint is of a run of {saved['schedule']['num_steps']} steps, at row "
                f"{saved['data']['position']} of its data; this run is one of {self.num_steps} steps, and would be at "
                f"row {self._position_at(step)}.",
                "Put the run's config back as it was, or start a new run.",
            )

    def _train_step(self, steps: Iterator[list[Example]]) -> None:
        result = self.trainer.step(next(steps), self.step + 1)
        self.step += 1
        self.tokens_seen += result.num_tokens
        self.recorder.step(self.step, result)
        self.job.progress(self.step)
        _print_step(self.step, self.num_steps, result)

    def _at_border(self) -> None:
        """What is due after a step. Saving comes last: a checkpoint means that everything up to its step is stored."""
        record, last = self.config.record, self.step == self.num_steps
        if last or _due(self.step, record.evaluate_every_steps):
            self._evaluate()
        if last or _due(self.step, record.sample_every_steps) or self.requests.sample:
            self._sample()
        if last or _due(self.step, record.save_every_steps) or self.requests.save:
            self._save()
        if not last:
            self._training_phase()

    def _stop_asked(self) -> bool:
        self.requests.read(self.job)
        return bool(self.requests.stop)

    def _training_phase(self) -> None:
        self.job.phase("training", total=self.num_steps, unit="steps", current=self.step)

    def _evaluate(self) -> None:
        if not self.corpus.valid or not self.config.record.evaluate_every_steps or self._evaluated_step == self.step:
            return
        self.job.phase("evaluating", total=self.num_steps, unit="steps", current=self.step)
        loss = self.trainer.evaluate(self.corpus.valid)
        self.recorder.valid_loss(self.step, loss)
        self._evaluated_step = self.step
        print(f"step {self.step}/{self.num_steps}  valid loss {loss:.4f}", flush=True)

    def _sample(self) -> None:
        self.requests.sample = False
        if not self.config.record.sample_prompts or self._sampled_step == self.step:
            return
        self.job.phase("sampling", total=self.num_steps, unit="steps", current=self.step)
        with self.trainer.precision():
            texts = take_samples(self.model, self.loaded, self.config.record, self.job.run_id, self.step)
        self.recorder.samples(self.step, texts)
        self._sampled_step = self.step

    def _save(self) -> None:
        self.requests.save = False
        if self._saved_step == self.step or self.step == 0:
            return
        self.job.phase("saving", total=self.num_steps, unit="steps", current=self.step)
        self.saved = self.checkpoints.save(self.step, self._content())
        self._saved_step = self.step
        print(f"saved {self.saved.name}", flush=True)

    def _content(self) -> dict[str, Any]:
        """All that is needed to go on: plain containers and tensors, so that it loads with weights_only."""
        return {
            "meta": {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "run_id": self.job.run_id,
                "method": self.config.method,
                "base": self.config.model.base,
                "base_fingerprint": self._base_fingerprint(),
                "config": self.config.model_dump(mode="json"),
                "adapter_config": adapters.adapter_config(self.model),
                "versions": checkpoint.versions(),
            },
            "state_dict": adapters.trainable_state(self.model),
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": self.trainer.scaler.state_dict(),
            "schedule": self._schedule_at(self.step),
            "data": {
                "position": self._position_at(self.step),
                "tokens_seen": self.tokens_seen,
                "fingerprints": self.corpus.fingerprints,
            },
            "rng": checkpoint.rng_state(),
        }

    def _schedule_at(self, step: int) -> dict[str, int]:
        return {"step": step, "num_steps": self.num_steps, "warmup_steps": self.trainer.warmup_steps}

    def _position_at(self, step: int) -> int:
        """Rows of the mixture that the steps up to this one have used."""
        return step * self.config.examples_per_step

    def _base_fingerprint(self) -> str:
        return model_fingerprint(self.loaded.folder)


def count_steps(corpus: Corpus, config: RunConfig) -> int:
    """Optimizer steps of the run: as configured, or enough for the configured epochs."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    rows = mix.epoch_length(corpus.sizes, config.data.sources)
    return mix.num_steps(rows, config.train.num_epochs or 1, config.examples_per_step)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _print_plan(config: RunConfig, corpus: Corpus, trainer: Trainer, device: torch.device, dtype: torch.dtype) -> None:
    learned = sum(parameter.numel() for parameter in adapters.trainable_parameters(trainer.model))
    rows = ", ".join(f"{name} {size}" for name, size in corpus.sizes.items())
    print(
        f"{config.method} on {device}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads; "
        f"{learned:,} weights learn; rows: {rows}, {len(corpus.valid)} for validation; {trainer.num_steps} steps of "
        f"{config.examples_per_step} rows, warm-up {trainer.warmup_steps}",
        flush=True,
    )
    print(describe_packing(corpus, config, trainer.packing, trainer.num_steps), flush=True)


def _print_step(step: int, num_steps: int, result: StepResult) -> None:
    print(
        f"step {step}/{num_steps}  loss {result.loss:.4f}  learning rate {result.learning_rate:.2e}  "
        f"grad norm {result.grad_norm:.3f}  {result.num_tokens / result.seconds:.0f} tokens/s",
        flush=True,
    )
