"""A process is asked to stop by a signal where it listens for one: any other would be ended by that."""

import subprocess
import sys
from pathlib import Path

import pytest

from studio import processes

LISTENS = f"signal.signal({int(processes.STOP_SIGNALS['save'])}, lambda *_: sys.exit(5))"
WAITS = "print('ready', flush=True); time.sleep(600)"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no other system tells who listens")
def test_only_who_listens_is_asked_to_stop() -> None:
    for handler, listens in ((LISTENS, True), ("", False)):
        program = f"import signal, sys, time\n{handler}\n{WAITS}"
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            pid, created = process.pid, processes.created(process.pid)
            assert not processes.ask_to_stop(pid, created - 60, "save")  # another one of that id
            assert not processes.ask_to_stop(pid, created, "discard")
            assert processes.lives(pid, created)
            assert processes.ask_to_stop(pid, created, "save") == listens
            if not listens:
                assert processes.lives(pid, created)
                process.kill()
            assert process.wait(60) == (5 if listens else -9)
        assert not processes.ask_to_stop(pid, created, "save")
