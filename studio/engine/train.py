"""The `train` verb: a run from its frozen config to its last checkpoint, with numbers and samples on the way."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from studio import faults, machine
from studio.config.schema import RunConfig
from studio.data.tokens import Example
from studio.engine import adapters, checkpoint, devices
from studio.engine.batches import Corpus, describe_packing, examples_from
from studio.engine.beginning import begin
from studio.engine.best import Best
from studio.engine.checkpoint import CheckpointFolder, Found
from studio.engine.circumstances import circumstances, weights_sha256
from studio.engine.distributed import ranks_of
from studio.engine.health import BrokeDownError, Health
from studio.engine.job import STOPPED, STOPPED_WITHOUT_SAVING, JobContext
from studio.engine.launch import configured
from studio.engine.loop import NotFiniteError, StepResult, Trainer
from studio.engine.memory_full import MemoryFullError, OneTooLargeError, until_it_fits, what_fits
from studio.engine.models.load import LoadedModel
from studio.engine.prepare import Prepared, prepare
from studio.engine.probing import Prober
from studio.engine.record import Recorder, Silence
from studio.engine.requests import Requests
from studio.engine.sampling import take_samples
from studio.engine.saving import Saver, SaveTimer
from studio.engine.state import NOT_CARRIED, Counters, DataPlace, RunState, Schedule
from studio.engine.zero_folder import read_own
from studio.estimate import Twice
from studio.models import model_fingerprint
from studio.paths import clear_leftovers, inside, typed_path
from studio.store import open_db, runs

Result = TypeVar("Result")
TWICE = "gradient_checkpointing"  # in a run's detail: what auto came to


class LeftOut(Exception):
    """A stop was asked for, and does not wait for a measurement or for samples."""


def run(job: JobContext) -> dict[str, Any]:
    """Train, from the start or on from a checkpoint. args: config (path in the project), resume ("", "auto", path)."""
    started = time.monotonic()
    config = configured(job)
    devices.set_threads()
    devices.seed_all(config.train.seed)
    training = Training.prepare(job, config)
    training.resume(job.args.get("resume", ""))
    try:
        training.run()
    finally:
        training.recorder.flush()
    training.ranks.leave()
    result = training.result(round(time.monotonic() - started, 3))
    if training.requests.stop:
        job.stopped(result, STOPPED if training.requests.stop == "save" else STOPPED_WITHOUT_SAVING)
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
        twice: Twice | None = None,
    ) -> None:
        self.job, self.config = job, config
        self.loaded, self.model, self.trainer, self.corpus = loaded, model, trainer, corpus
        self.ranks = trainer.ranks
        self.requests = Requests(job, self.ranks)
        first = self.ranks.is_first
        self.recorder = Recorder(job.folder, job.run_id, loaded.device) if first else Silence()
        run_dir = inside(job.folder, job.args["config"]).parent
        self.checkpoints = CheckpointFolder(job.folder, job.run_id, run_dir, config.record.keep_last)
        with trainer.forward.precision():
            self.prober = Prober(job.folder, config, loaded)
        self.health, self.best = Health.of(config.train), Best.of(config)
        self.step, self.num_steps = 0, trainer.num_steps
        self.tokens_seen = 0
        timer = SaveTimer(config.record.save_every_minutes)
        self.saver = Saver(
            trainer, self.checkpoints, self.recorder, self.requests, self.health, self.best, self.phase, timer
        )
        self._twice = twice  # a choice that this job has made, for the run to keep
        self._owed: tuple[str, ...] = ()  # what a stop left out at this step
        self._too_large: MemoryFullError | None = None  # what ends the run once its step is saved

    @classmethod
    def prepare(cls, job: JobContext, config: RunConfig) -> "Training":
        """Load the model and the data. Raises StudioError, StopRequested."""
        with open_db(job.folder) as db:
            detail = runs.get(db, job.run_id).detail
        is_twice = detail.get(TWICE) if job.args.get("resume") else None
        ready = prepare(job, config, detail.get("datasets"), ranks_of(config), is_twice)
        _print_plan(config, ready)
        return cls(job, config, ready.loaded, ready.model, ready.trainer, ready.corpus, ready.twice)

    def resume(self, source: str) -> None:
        """Go on from a checkpoint: "" starts anew, "auto" takes the newest sound one, else a path in the project."""
        self.ranks.join(self.loaded.device)
        if self.ranks.is_first:
            clear_leftovers(self.checkpoints.run_dir, older_than_seconds=0)  # only this process writes there
        path, notices = self._chosen(source)
        spread: dict[str, Any] = {}
        state = RunState.read(checkpoint.load_checkpoint(path)) if path else None
        if path and state:
            self.job.phase(f"resuming from {path.name}")
            spread = self._restore(state, path)
        self.recorder.begin(self.num_steps, self.step, state.counters.stored if state else {})
        if path:
            self.recorder.event(self.step, "resumed", file=path.name)
        elif self.config.model.continue_from:
            self._take_weights(typed_path(self.config.model.continue_from))
        if not path:
            self.trainer.join(self.ranks)
            if self.ranks.rank:  # what is dropped differs from rank to rank
                torch.manual_seed(self.config.train.seed + self.ranks.rank)
        self.recorder.began(self.step, circumstances(self.loaded, self.trainer))
        if self._twice:
            self.recorder.note(**{TWICE: self._twice.is_on}, predicted_bytes=self._twice.chosen)
            if self._twice.is_on:
                self.recorder.event(self.step, "computed_twice", **asdict(self._twice))
        for notice in notices:
            self.recorder.event(self.step, "passed_over", reason=notice)
        if spread:
            self.recorder.event(self.step, "spread_anew", **spread)
        self.saver.require_space()

    def run(self) -> None:
        """Train to the last step, or to the border where a person asked to stop or nothing gets better."""
        if self.step == 0:
            self._measure(everything=True)
        elif self._owed:
            self._do(self._owed)
            self._save(must=False)  # this step is saved; a new best among what was owed wants no other checkpoint
        steps = self.trainer.ahead(examples_from(self.corpus, self.config, self._position_at(self.step)))
        self._training_phase()
        self.saver.begin()
        while self.step < self.num_steps and not self._stop_asked() and not self._is_enough:
            self._train_step(next(steps))
            self._at_border()
        if self.best.should_stop and self.step < self.num_steps:
            self.recorder.event(self.step, "early_stop", **self.best.stop_detail())
            print(self.best.why_stopped(), flush=True)
        if self.requests.stop != "discard":
            self._save(must=True)
            self.saver.settle()
        if self._too_large and self.step < self.num_steps:
            raise self._too_large

    @property
    def _is_enough(self) -> bool:
        """Whether the run is to end before its last step."""
        return self.best.should_stop or self._too_large is not None

    def result(self, seconds: float) -> dict[str, Any]:
        """What the job's row keeps."""
        latest = self.recorder.latest()
        stopped_early = self.best.should_stop and self.step < self.num_steps
        saved = self.saver.path
        return {
            "steps": self.step,
            "final_loss": latest.get("train/loss"),
            "valid_loss": latest.get("valid/loss"),
            "checkpoint": str(saved.relative_to(self.job.folder.resolve())) if saved else "",
            "weights_sha256": "" if self.ranks.takes_steps else weights_sha256(adapters.trainable_state(self.model)),
            "bad_steps": self.health.num_bad,
            "micro_batch_size": self.trainer.micro_batch_size,
            "best_step": next((step for step in self.best.kept if self.checkpoints.has(step)), None),
            "early_stop": self.best.why_stopped() if stopped_early else "",
            "seconds": seconds,
        }

    def state(self) -> RunState:
        """All that is needed to go on after this step; all ranks ask for it together.

        Raises StoreBusyError while rows wait to be stored, once every rank has told what it has.
        """
        rng = self._rng()
        return RunState(
            about=self._about(),
            weights={} if self.ranks.takes_steps else adapters.trainable_state(self.model),
            optimizer={} if self.ranks.takes_steps else self.trainer.optimizer.state_dict(),
            scaler=self.trainer.scaler.state_dict(),
            schedule=self._schedule_at(self.step),
            data=DataPlace(self._position_at(self.step), self.tokens_seen, self.corpus.fingerprints),
            rng=rng,
            counters=Counters(
                micro_batch_size=self.trainer.micro_batch_size,
                health=self.health.state(),
                best=self.best.state(),
                stored=self.recorder.stored(self.step),
                owed=self._owed,
            ),
        )

    def _restore(self, saved: RunState, path: Path) -> dict[str, Any]:
        """Put everything where it was: what is computed from here on is the same as without a break.

        Returns how it was spread over processes and is now, where that changed: {"before", "now", "whole"}. Without
        `whole` the optimizer could not be taken along.
        """
        saved.require_same_run(self._expected_at(saved.step))
        spread = self._restore_weights(saved, path)
        self._set_rng(saved.rng)
        counters = saved.counters
        self.trainer.micro_batch_size = counters.micro_batch_size or self.trainer.micro_batch_size
        self.health.restore(counters.health)
        self.best.restore(counters.best)
        self.step, self.tokens_seen = saved.step, saved.data.tokens_seen
        # Saving comes last at a border: everything else that was due at this step is done and stored, unless a stop
        # did not wait for it.
        self._owed = tuple(counters.owed)
        self.saver.go_on_from(self.step, path)
        return spread

    def _restore_weights(self, saved: RunState, path: Path) -> dict[str, Any]:
        """Weights and optimizer, in the very pieces that they were saved in, or whole."""
        there, here = saved.about.get("ranks", {"world": 1, "zero_stage": None}), self._layout()
        if self.ranks.takes_steps and there == here:
            self.trainer.join(self.ranks)
            self.ranks.load(path, only_learned=adapters.is_adapter(self.model))
            return {}
        whole = saved.weights or read_own(path)["state_dict"]
        adapters.load_trainable_state(self.model, whole)
        self.trainer.join(self.ranks)
        if saved.optimizer and not self.ranks.takes_steps:
            self.trainer.optimizer.load_state_dict(saved.optimizer)
            self.trainer.scaler.load_state_dict(saved.scaler)
            return {} if there == here else {"before": there, "now": here, "whole": True}
        print(
            f"{path.name} was saved by {_shown_layout(there)} and is resumed by {_shown_layout(here)}: the weights, "
            "the place in the data and the schedule go on, the optimizer's memory begins anew.",
            flush=True,
        )
        return {"before": there, "now": here, "whole": False}

    def _layout(self) -> dict[str, Any]:
        """How weights and optimizer are shared out: what an exact resume must find again."""
        return {"world": self.ranks.world, "zero_stage": self.ranks.stage}

    def _rng(self) -> dict[str, Any]:
        """Every random generator, those of all ranks too."""
        state = checkpoint.rng_state()
        if self.ranks.world > 1:
            state["ranks"] = self.ranks.gather(torch.get_rng_state())
            if self.loaded.device.type == "cuda":
                state["gpus"] = self.ranks.gather(torch.cuda.get_rng_state(self.loaded.device))
        return state

    def _set_rng(self, state: dict[str, Any]) -> None:
        checkpoint.set_rng_state(state)
        if len(state.get("ranks", [])) == self.ranks.world > 1:
            torch.set_rng_state(state["ranks"][self.ranks.rank])
            if self.loaded.device.type == "cuda" and "gpus" in state:
                torch.cuda.set_rng_state(state["gpus"][self.ranks.rank], self.loaded.device)

    def _take_weights(self, path: Path) -> None:
        """Begin a new run with the weights of a checkpoint or an adapter, and nothing else of it."""
        self.job.phase("reading the weights to continue from")
        begin(self.model, path, model_fingerprint(self.loaded.folder))
        self.recorder.event(0, "weights_only", path=str(path))
        print(f"The run begins with the weights of {path}; {NOT_CARRIED} are not carried over.", flush=True)

    def _expected_at(self, step: int) -> RunState:
        """What a checkpoint of this run says of itself at a step; without tensors."""
        data = DataPlace(self._position_at(step), 0, self.corpus.fingerprints)
        return RunState(self._about(), {}, {}, {}, self._schedule_at(step), data, {}, Counters())

    def _chosen(self, source: str) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and why newer ones were passed over."""
        if source != "auto":
            return (inside(self.job.folder, source) if source else None), []
        found = checkpoint.find_resumable(self.checkpoints.run_dir) if self.ranks.is_first else Found(None, [])
        for notice in found.notices:
            self.job.phase(notice)
        name = self.ranks.share(found.path.name if found.path else "")
        if not name:
            print("There is no checkpoint to resume from; the run starts at the first step.", flush=True)
        return (self.checkpoints.run_dir / name if name else None), found.notices

    def _train_step(self, examples: list[Example]) -> None:
        number = self.step + 1
        try:
            result = self._step_that_fits(examples, number)
        except NotFiniteError as error:
            self._bad_step(number, error)
        except OneTooLargeError:
            self._save_what_is()
            raise
        else:
            self.tokens_seen += result.num_tokens
            self.recorder.step(number, result)
            _print_step(number, self.num_steps, result)
            self.health.good_step(number, result.loss)
        self.step = number
        self.job.progress(self.step)

    def _step_that_fits(self, examples: list[Example], number: int) -> StepResult:
        """Take the step, in smaller micro-batches when memory runs out. Raises MemoryFullError, NotFiniteError."""

        def step() -> StepResult:
            faults.hit("step")
            return self.trainer.step(examples, number)

        return self._that_fits(step, number)

    def _that_fits(self, call: Callable[[], Result], number: int) -> Result:
        """What `call` returns; that it had to be done in smaller micro-batches is said, and may end the run here."""
        wanted = self.trainer.micro_batch_size
        result = until_it_fits(self.trainer, call)
        fitting = self.trainer.micro_batch_size
        if fitting < wanted:
            if self.config.train.on_out_of_memory == "stop":
                self._too_large = what_fits(wanted, *self.config.micro_batches(fitting), number)
            self.recorder.event(number, "smaller_micro_batch", before=wanted, now=fitting)
            print(f"step {number}: out of memory; micro-batches of {fitting} from here on, not {wanted}", flush=True)
        return result

    def _bad_step(self, number: int, error: NotFiniteError) -> None:
        """The step is not taken; too many in a row end the run."""
        print(f"step {number}/{self.num_steps}  not taken: {error.what}", flush=True)
        self.trainer.scaler.update()
        self.recorder.bad_step(number, error.what)
        try:
            self.health.bad_step(number, error.what)
        except BrokeDownError:
            if self.health.has_learnt:
                self._save_what_is()
            raise

    def _save_what_is(self) -> None:
        """Before an error ends the run: the weights are those of the last good step, or lost."""
        with contextlib.suppress(BrokeDownError):
            self._save(must=True)

    def _at_border(self) -> None:
        """What is due after a step. Saving comes last: a checkpoint means that everything up to its step is stored."""
        record, last = self.config.record, self.step == self.num_steps
        self._measure(everything=last)
        if last or _due(self.step, record.save_every_steps) or self.requests.save or self.saver.is_due():
            self._save(must=last)
        if not last:
            self._training_phase()

    def _measure(self, everything: bool) -> None:
        """Evaluate, probe and sample, as far as it is due at this step."""
        record = self.config.record
        due = {
            "evaluation": bool(self.corpus.valid) and self._is_due(record.evaluate_every_steps, everything),
            "probes": self._is_due(record.probe_every_steps, everything),
            "samples": everything or self.requests.sample or _due(self.step, record.sample_every_steps),
        }
        self.requests.sample = False
        self._do([what for what, is_due in due.items() if is_due])

    def _is_due(self, interval: int, everything: bool) -> bool:
        return interval > 0 and (everything or _due(self.step, interval))

    def _do(self, due: Sequence[str]) -> None:
        """Measure and sample. A stop waits for none of it; what it leaves out is owed: done when the run goes on."""
        does = {"evaluation": self._evaluate, "probes": self._probe, "samples": self._sample}
        self._owed = ()
        for place, what in enumerate(due):
            try:
                self._require_no_stop()
                does[what]()
            except LeftOut:
                self._owed += (what,)
            except OneTooLargeError:
                self._owed += tuple(due[place:])
                self._save_what_is()
                raise
        if self._owed:
            left = ", ".join(self._owed)
            print(f"step {self.step}: a stop was asked for; left for when the run goes on: {left}", flush=True)

    def _require_no_stop(self) -> None:
        if self._stop_asked():
            raise LeftOut

    def _between(self) -> None:
        """Asked within a measurement, which takes minutes on a CPU; several processes end those that they began."""
        if self.ranks.world == 1:
            self._require_no_stop()

    def _save(self, must: bool) -> None:
        self.saver.save(self.step, self.state, must)

    def _stop_asked(self) -> bool:
        self.requests.read_together()
        return bool(self.requests.stop)

    def _training_phase(self) -> None:
        if self.saver.is_put_off and not self.health.suspicious:
            self.phase("training; a checkpoint waits for disk space")
        else:
            self.phase("training")

    def phase(self, phase: str) -> None:
        """What is done now, at this step."""
        self.job.phase(phase, total=self.num_steps, unit="steps", current=self.step)

    def _evaluate(self) -> None:
        self.phase("evaluating")
        loss = self._that_fits(lambda: self.trainer.evaluate(self.corpus.valid, self._between), self.step)
        self.recorder.measured(self.step, {"valid/loss": loss})
        if not math.isfinite(loss):
            self.recorder.event(self.step, "valid_not_finite")
        self.saver.due |= self.best.see("valid_loss", self.step, loss)
        print(f"step {self.step}/{self.num_steps}  valid loss {loss:.4f}", flush=True)

    def _probe(self) -> None:
        self.phase("asking held-out questions")
        with self.trainer.forward.precision():
            found = self.ranks.share(self.prober.measure(self.model, self._between) if self._generates else {})
        self.recorder.measured(self.step, found)
        self.saver.due |= self.best.probed(self.step, found)
        shown = "  ".join(f"{name.split('/')[1]} {share:.0%}" for name, share in found.items())
        print(f"step {self.step}/{self.num_steps}  {shown}", flush=True)

    @property
    def _generates(self) -> bool:
        """Whether this rank writes answers: the first, and all of them where each has a part of the weights."""
        return self.ranks.is_first or self.ranks.partitions_weights

    def _sample(self) -> None:
        if not self.config.record.sample_prompts or not self._generates:
            return
        self.phase("sampling")
        asked = (self.model, self.loaded, self.config.record, self.job.run_id, self.step)
        should_stop = self._stop_asked if self.ranks.world == 1 else None
        with self.trainer.forward.precision():
            texts = take_samples(*asked, should_stop, self.ranks.partitions_weights)
        if should_stop and self.requests.stop:
            raise LeftOut
        self.recorder.samples(self.step, texts)

    def _about(self) -> dict[str, Any]:
        """Which run, base and config a checkpoint belongs to; also what a conversion needs to know."""
        return {
            "run_id": self.job.run_id,
            "method": self.config.method,
            "base": self.config.model.base,
            "base_fingerprint": model_fingerprint(self.loaded.folder),
            "config": self.config.model_dump(mode="json"),
            "adapter_config": adapters.adapter_config(self.model),
            "versions": machine.versions(),
            "ranks": self._layout(),
        }

    def _schedule_at(self, step: int) -> Schedule:
        return Schedule(step, self.num_steps, self.trainer.warmup_steps)

    def _position_at(self, step: int) -> int:
        """Rows of the mixture that the steps up to this one have used."""
        return step * self.config.examples_per_step


def _shown_layout(layout: dict[str, Any]) -> str:
    stage = layout.get("zero_stage")
    return f"{layout['world']} processes" + ("" if stage is None else f" with ZeRO-{stage}")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _print_plan(config: RunConfig, ready: Prepared) -> None:
    trainer, corpus = ready.trainer, ready.corpus
    learned = sum(parameter.numel() for parameter in adapters.trainable_parameters(ready.model))
    rows = ", ".join(f"{name} {size}" for name, size in corpus.sizes.items())
    print(
        f"{config.method} on {ready.loaded.device}, {str(ready.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads; "
        f"{learned:,} weights learn; rows: {rows}, {len(corpus.valid)} for validation; {trainer.num_steps} steps of "
        f"{config.examples_per_step} rows, warm-up {trainer.warmup_steps}",
        flush=True,
    )
    print(describe_packing(corpus, config, trainer.packing, trainer.num_steps), flush=True)
    print(f"attention {trainer.forward.kind}: {trainer.forward.why}", flush=True)
    why = trainer.forward.why_not_compiled
    print(f"not compiled: {why}" if why else "compiled: what fits of layers, attention and loss", flush=True)


def _print_step(step: int, num_steps: int, result: StepResult) -> None:
    print(
        f"step {step}/{num_steps}  loss {result.loss:.4f}  learning rate {result.learning_rate:.2e}  "
        f"grad norm {result.grad_norm:.3f}  {result.num_tokens / result.seconds:.0f} tokens/s",
        flush=True,
    )
