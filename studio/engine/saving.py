"""When and how a run is saved: by all its processes together, put off while there is no space, awaited at the end."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from studio.checkpoint_files import STATE_FILE
from studio.engine import adapters
from studio.engine.best import Best
from studio.engine.checkpoint import CheckpointFolder, write_pth
from studio.engine.health import Health
from studio.engine.loop import Trainer
from studio.engine.record import Recorder, Silence
from studio.engine.requests import Requests
from studio.engine.state import RunState
from studio.errors import DiskFullError, StoreBusyError

SAVED_BYTES = 12  # of a weight that learns: itself, and two moments of its gradient, in float32
SPACE_LOOK_SECONDS = 3.0
SAVE_AGAIN_SECONDS = 10.0
TIMES_A_SAVE = 20  # so many times what the last save took, the next one by time waits: at most 5 % of a run is saving


class SaveTimer:
    """When a checkpoint is due by time: so many minutes after the last one, or after training began; 0 never is.

    `now` is a clock in seconds that never goes back.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.is_on = minutes > 0
        self._seconds, self._now = 60 * minutes, now
        self._since = self._began = now()
        self._took = 0.0

    def start(self) -> None:
        """Nothing that could be lost was computed before this."""
        self._since = self._now()

    def begin(self) -> None:
        """A save begins, whatever it is made for."""
        self._began = self._now()

    def end(self) -> None:
        """The save that began last has succeeded."""
        self._since = self._now()
        self._took = self._since - self._began

    def is_due(self) -> bool:
        return self.is_on and self._now() - self._since >= max(self._seconds, TIMES_A_SAVE * self._took)


class Saver:
    """Saves a run. Every process has one and calls the same at the same border; what they find out is agreed on.

    `due`: a checkpoint is wanted at the next border, whatever the time. `path`: the last one that was saved or gone on
    from.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: CheckpointFolder,
        recorder: Recorder | Silence,
        requests: Requests,
        health: Health,
        best: Best,
        phase: Callable[[str], None],
        timer: SaveTimer,
    ) -> None:
        self.due = False
        self.path: Path | None = None
        self._step = -1
        self._trainer, self._ranks = trainer, trainer.ranks
        self._checkpoints, self._recorder, self._requests = checkpoints, recorder, requests
        self._health, self._best, self._phase, self._timer = health, best, phase, timer
        self._tried_at: float | None = None  # when a save was put off last, while it is

    @property
    def is_put_off(self) -> bool:
        """Whether a checkpoint waits for space."""
        return self.due and self._tried_at is not None

    def begin(self) -> None:
        """Training begins, or goes on."""
        self._timer.start()

    def is_due(self) -> bool:
        """Whether a checkpoint is wanted at this border. All processes ask together: the time is the first one's."""
        return self.due or (self._timer.is_on and self._ranks.share(self._timer.is_due()))

    def require_space(self) -> None:
        """A run that cannot save its first checkpoint is not begun. Raises DiskFullError."""
        if self._ranks.is_first:
            learned = self._ranks.num_learned(adapters.trainable_parameters(self._trainer.model))
            self._checkpoints.require_space(SAVED_BYTES * learned, "the first checkpoint")

    def go_on_from(self, step: int, path: Path) -> None:
        """The run goes on after this checkpoint; see CheckpointFolder.go_on_from."""
        self._step, self.path = step, path
        if self._ranks.is_first:
            self._checkpoints.go_on_from(step, path, self._best.kept)
            self._mark_best()

    def save(self, step: int, state: Callable[[], RunState], must: bool) -> None:
        """Save this step; while there is no space, training goes on, or waits here when the step must be saved.

        `state` is called by all processes together, and may raise StoreBusyError in the first. Raises BrokeDownError
        when the weights are not finite: after no later step would they be.
        """
        self.due |= self._requests.save
        self._requests.save = False
        if self._step == step or step == 0:
            self.due = False
            return
        if not must and (self._health.suspicious or self._tried_just_now()):
            self.due = True
            return
        if not self._ranks.are_finite(adapters.trainable_parameters(self._trainer.model)):
            raise self._health.spoilt(step)
        while not self._try(step, state) and must and self._requests.stop != "discard":
            self._wait_for_space()
            self._requests.read_together()

    def settle(self) -> None:
        """Nothing waits in memory when the run ends."""
        while self._ranks.is_first and self._requests.stop != "discard":
            try:
                self._recorder.settle()
                self._checkpoints.match_rows()
                self._mark_best()
                return
            except StoreBusyError as error:
                print(f"the end of the run is not stored yet: {error}", flush=True)
                self._wait_for_space()
                self._requests.read()

    def _tried_just_now(self) -> bool:
        is_soon = self._tried_at is not None and time.monotonic() - self._tried_at < SAVE_AGAIN_SECONDS
        return self._ranks.share(is_soon)

    def _try(self, step: int, state: Callable[[], RunState]) -> bool:
        """Whether it could be saved now: the first process's answer, in all of them."""
        self._phase("saving")
        self._timer.begin()
        commit = self._commit_folder if self._ranks.takes_steps else self._commit_file
        is_done = True
        try:
            commit(step, state)
        except (DiskFullError, StoreBusyError) as error:
            is_done = False
            print(f"step {step}: not saved yet. {error}", flush=True)
            if self._tried_at is None:  # said once, until a save succeeds
                self._recorder.event(step, "save_put_off", reason=error.message)
        if not self._ranks.share(is_done):
            self.due, self._tried_at = True, time.monotonic()
            return False
        self.due, self._tried_at = False, None
        self._timer.end()
        self._step, self.path = step, self._checkpoints.run_dir / f"step_{step}.pth"
        if self._ranks.is_first:
            with contextlib.suppress(StoreBusyError):  # the checkpoint is safe; the mark is made with the next one
                self._mark_best()
        print(f"saved {self.path.name}", flush=True)
        return True

    def _commit_file(self, step: int, state: Callable[[], RunState]) -> None:
        found = state()
        if self._ranks.is_first:
            self._checkpoints.save(step, found.content(), keep=self._keep())

    def _keep(self) -> tuple[int, ...]:
        """Steps that stay: the best, and while the run may be going wrong the last one from before."""
        return self._best.kept + ((self._step,) if self._health.suspicious else ())

    def _commit_folder(self, step: int, state: Callable[[], RunState]) -> None:
        if self._ranks.is_first:
            self._lead(step, state)
            return
        state()
        # The first process is told of what this one could not write, and says what becomes of it.
        with contextlib.suppress(OSError):
            self._write_shards(self._ranks.share(None), {})

    def _lead(self, step: int, state: Callable[[], RunState]) -> None:
        """The first process's part of saving a folder: the others learn where to write once it is known that they can,
        or that they cannot."""
        told = False

        def write(temporary: Path) -> None:
            nonlocal told
            told = True
            self._write_shards(self._ranks.share(str(temporary)), {"meta": content["meta"]})
            write_pth(temporary / STATE_FILE, content)

        try:
            content = state().content()
            self._checkpoints.commit(step, write, keep=self._keep())
        finally:
            if not told:
                self._ranks.share("")

    def _write_shards(self, folder: str, content: dict[str, object]) -> None:
        """This process's files of a folder; none when there is no folder. Raises OSError."""
        if folder:
            self._ranks.save(Path(folder), content, only_learned=adapters.is_adapter(self._trainer.model))

    def _wait_for_space(self) -> None:
        self._phase("waiting for disk space")
        time.sleep(SPACE_LOOK_SECONDS)

    def _mark_best(self) -> None:
        if self._best.kept and self._best.value is not None:
            self._checkpoints.mark_best(self._best.step, self._best.measure, self._best.value)
