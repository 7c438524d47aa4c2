"""The database opens without pandas and numpy, and keeps nobody else from them."""

import subprocess
import sys
import threading

import pytest

from studio.store.light import left_out

LOADED = "import sys, studio.jobs, studio.ui.frame; print(sorted({'pandas', 'numpy', 'torch'} & set(sys.modules)))"


def test_pages_begin_without_pandas() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_left_out_holds_for_this_thread_and_this_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    found: list[str] = []

    def other_thread() -> None:
        import wave

        found.append(wave.__name__)

    with left_out("wave"):
        with pytest.raises(ModuleNotFoundError):
            import wave
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    import wave  # noqa: F811

    assert found == [wave.__name__] == ["wave"]
