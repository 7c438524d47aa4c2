"""What was asked of a server is read as it was written, whatever the words."""

from dataclasses import replace
from pathlib import Path

import pytest

from studio import request_log
from studio.request_log import Asked, RequestLog

ASKED = Asked("2026-01-01T00:00:00.000+00:00", "Ann", "base", 3, 4, 0.5, 0.1, "stop", "", "one\u2028two", "a\x85好")


def test_kept_words_come_back_and_damaged_lines_do_not(tmp_path: Path) -> None:
    RequestLog(tmp_path, keeps_words=True).add(ASKED)
    with open(tmp_path / request_log.FILE, "a", encoding="utf-8") as file:
        file.write('{"at": "2026\n')
    RequestLog(tmp_path).add(ASKED)
    assert request_log.read(tmp_path) == [replace(ASKED, prompt="", answer=""), ASKED]


def test_a_full_file_gives_way_to_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_BYTES", 400)
    log = RequestLog(tmp_path)
    for number in range(9):
        log.add(replace(ASKED, model=str(number)))
    found = [asked.model for asked in request_log.read(tmp_path)]
    assert found == [str(number) for number in range(8, 8 - len(found), -1)] and 2 <= len(found) < 9
