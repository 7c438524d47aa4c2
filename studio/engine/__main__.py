"""`python -m studio.engine VERB JOB_DIR`: one job in its own process. Torch is imported only when its turn has come."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

from studio.engine import environment, tuning
from studio.engine.job import JobContext, PatientOutput

# verb -> module below studio.engine with a function `run(job)`; its result (a dict) is stored in the job's row.
VERBS = {
    "fetch": "studio.engine.models.fetch",
    "import": "studio.engine.importing",
    "tokenize": "studio.engine.tokenize",
    "check": "studio.engine.checking",
    "report": "studio.engine.counting",
    "train": "studio.engine.launch",
    "measure": "studio.engine.measure",
    "distill": "studio.engine.distill",
    "convert": "studio.engine.convert",
    "merge": "studio.engine.merge",
    "export": "studio.engine.export",
    "push": "studio.engine.push",
    "ollama": "studio.engine.ollama",
    "smoke": "studio.engine.smoke",
    "split": "studio.engine.split",
    "layout": "studio.engine.relayout",
    "import_checkpoint": "studio.engine.importing_checkpoint",
    "evaluate": "studio.engine.evaluate",
    "lm_eval": "studio.engine.harness",
    "serve": "studio.engine.server",
}
COMPUTES = ("train", "measure", "distill", "evaluate", "lm_eval")


def main(verb: str, job_dir: Path) -> int:
    """Run one job to its end; the exit code is 0 when it finished or was stopped as asked."""
    environment.prepare()
    with contextlib.redirect_stdout(PatientOutput(sys.stdout)), contextlib.redirect_stderr(PatientOutput(sys.stderr)):
        return _live(verb, job_dir)


def _live(verb: str, job_dir: Path) -> int:
    with JobContext.open(job_dir) as job:
        job.wait_for_turn()
        if verb in COMPUTES:
            job.phase("preparing the processor")
            tuning.apply()
        os.environ.setdefault("GOMP_SPINCOUNT", tuning.DEFAULT_SPIN)
        job.finish(importlib.import_module(VERBS[verb]).run(job))
    return job.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in VERBS:
        sys.exit(f"usage: python -m studio.engine {{{','.join(VERBS)}}} JOB_DIR")
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
