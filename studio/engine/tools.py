"""Programs of others that a job runs: found on the PATH, watched, ended with the job, their last words told."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from studio.engine.job import JobContext
from studio.errors import StudioError

POLL_SECONDS = 0.5


def run_tool(job: JobContext, words: Sequence[str], folder: Path, hint: str) -> str:
    """Run a program in a folder to its end; returns what it printed.

    Raises StudioError when it is not installed (`hint` says how to get it) or fails, with its last line;
    StopRequested when the job is stopped, and the program with it.
    """
    program = shutil.which(words[0])
    if program is None:
        raise StudioError(f"{words[0]!r} is not on the PATH.", hint)
    with TemporaryFile() as output:
        with subprocess.Popen(
            [program, *words[1:]], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            try:
                _wait(job, process)
            finally:
                process.kill()
        output.seek(0)
        said = output.read().decode("utf-8", "replace").strip()
    print(said, flush=True)  # into the job's log
    if process.returncode:
        last = said.splitlines()[-1] if said else "it printed nothing"
        raise StudioError(f"{words[0]} failed with exit code {process.returncode}: {last}", "The job's log says more.")
    return said


def _wait(job: JobContext, process: "subprocess.Popen[bytes]") -> None:
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            job.check_stop()
