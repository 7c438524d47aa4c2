"""What a person asked of a run, as its processes see it at step borders."""

from studio.engine.distributed import Alone
from studio.engine.job import JobContext


class Requests:
    """What was asked for and not done yet; `stop` is "", "save" or "discard"."""

    def __init__(self, job: JobContext, ranks: Alone) -> None:
        self.stop = ""
        self.save = self.sample = False
        self._job, self._ranks = job, ranks

    def read(self) -> None:
        """Take up what this process was asked for since it last looked."""
        asked = self._job.requests()
        self.stop = asked.stop_request or self.stop
        self.save |= bool(asked.save_request)
        self.sample |= bool(asked.sample_request)

    def read_together(self) -> None:
        """All ranks do the same: what rank 0 was asked for, and a stop that the system asked any of them for."""
        self.read()
        if self._ranks.world == 1:
            return
        asked = (self.stop == "save", self.stop == "discard", self.save, self.sample)
        save, discard, self.save, self.sample = (bool(each) for each in self._ranks.sums(*map(float, asked)))
        self.stop = "discard" if discard else "save" if save else ""
