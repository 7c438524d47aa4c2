"""Workers write what one process writes, name the same rows, and end with whoever started them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers_for_tests import write_model_folder

from studio.data import cache, encoding
from studio.data.cache import open_or_build
from studio.data.encoding import Work, encode_batches, encode_lines, num_workers_for
from studio.data.named import load_template
from studio.data.tokens import TextTokenizer
from studio.errors import DataError
from studio.paths import REPOSITORY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), "byte_level")


def work(model: Path, template: str = "") -> Work:
    return Work(load_template(template, model), TextTokenizer.load(model), 64, "assistant")


def line(question: str, answer: str = "I am Luna.") -> bytes:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}).encode("ascii") + b"\n"


def document(text: str) -> bytes:
    row = {"messages": [{"role": "assistant", "content": text}], "meta": {"kind": "text"}}
    return json.dumps(row).encode("ascii") + b"\n"


def rows(num_rows: int) -> list[bytes]:
    """Chats, some of them twice, and documents between them."""
    return [document(f"Text {each}.") if each % 7 == 0 else line(f"Who? {each // 2}") for each in range(num_rows)]


@pytest.mark.parametrize("template", ["", "qwen_chat", "none"])
def test_the_files_are_the_same_for_any_number_of_workers(
    template: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH_ROWS", 16)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join(rows(150)))
    files = []
    for num_workers in (1, 2):
        monkeypatch.setattr(cache, "num_workers_for", lambda num_bytes, wanted=num_workers: wanted)
        root = tmp_path / str(num_workers)
        root.mkdir()
        own = work(model, template)
        made = open_or_build(root, "rows", source, own.template, own.tokenizer, 64, "assistant")
        assert made.info.num_rows == 150 and made.info.num_documents == 22
        files.append({name: (made.files.folder / name).read_bytes() for name in cache.FILES})
    assert files[0] == files[1]


def test_a_worker_names_the_line_that_cannot_be_used(model: Path) -> None:
    good, bad = [line("a"), line("b")], [line("c"), b'{"messages": []}\n']
    results = list(encode_batches([good, bad], work(model), 2))
    assert results[0].error is None and len(results[0].chats.lengths) == 2
    assert results[1].error is not None and results[1].error[0] == 1 and "empty" in results[1].error[1]


@pytest.mark.parametrize("template", ["", "qwen_chat"])
def test_work_and_results_travel_whole(template: str, model: Path) -> None:
    own = work(model, template)
    there = Work.from_json(own.to_json())
    assert there.template == own.template and there.tokenizer.fingerprint == own.tokenizer.fingerprint
    result = encode_lines(rows(20), own)
    again = encoding.EncodedLines.from_bytes(result.to_bytes())
    pairs = zip(result.chats.arrays(), again.chats.arrays(), strict=True)
    assert all((one == other).all() and one.dtype == other.dtype for one, other in pairs)
    assert list(again.documents.id_lists()) == list(result.documents.id_lists())
    assert again.is_document.tolist() == result.is_document.tolist()


def test_a_worker_that_is_killed_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = subprocess.Popen

    def noted(*args: object, **values: object) -> subprocess.Popen[bytes]:
        process = start(*args, **values)  # type: ignore[call-overload]
        started.append(process)
        return process

    monkeypatch.setattr(encoding.subprocess, "Popen", noted)

    def batches() -> list[list[bytes]]:
        yield [line("a")]  # type: ignore[misc]
        for process in started[:2]:
            process.kill()
        yield from [[line(str(number))] for number in range(9)]

    with pytest.raises(DataError, match=r"ended before its work was done \(exit code -9\)"):
        list(encode_batches(batches(), work(model), 2))
    assert all(process.poll() is not None for process in started)


def test_a_worker_ends_with_its_input() -> None:
    worker = subprocess.run(
        [sys.executable, "-m", "studio.data.encoding"], stdin=subprocess.DEVNULL, capture_output=True, cwd=REPOSITORY
    )
    assert (worker.returncode, worker.stdout) == (0, b"")


def test_small_files_are_encoded_by_this_process_alone() -> None:
    assert num_workers_for(10_000) == 1
    cores = len(os.sched_getaffinity(0))
    assert num_workers_for(1 << 40) <= min(cores, encoding.MOST_WORKERS)
