"""Every kind of file gives the same rows, in bounded memory; hostile ones a DataError that names them; nothing runs."""

import gzip
import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.data import json_rows, streams, tables
from studio.data.files import ReadOptions, data_files, scan
from studio.data.formats import import_rows
from studio.data.streams import Position
from studio.errors import DataError
from studio.paths import REPOSITORY

ROWS = [{"question": "你好，\n世界?", "answer": '"so", she said'}, {"question": "=1+1", "answer": "<b>2</b>"}]
ANY_FILE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def csv_text(delimiter: str = ",") -> str:
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "\r\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells) + "\r\n"


def workbook(rows: list[list[object]], title: str = "Sheet") -> bytes:
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def parquet() -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), content)
    return content.getvalue()


def arrow(new: Callable[..., Any] = pyarrow.ipc.new_stream) -> bytes:
    content = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    with new(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


TABLE = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": JSONL.encode,
    "a.json": lambda: json.dumps(ROWS).encode(),
    "object.json": lambda: json.dumps({"data": ROWS}, indent=1).encode(),
    "bom.jsonl": lambda: JSONL.encode("utf-8-sig"),
    "chinese.jsonl": lambda: JSONL.encode("gb18030"),
    "utf16.jsonl": lambda: JSONL.encode("utf-16"),
    "utf32.json": lambda: json.dumps(ROWS, ensure_ascii=False).encode("utf-32"),
    "no suffix": JSONL.encode,
    "a.csv": csv_text().encode,
    "bom.csv": lambda: csv_text().encode("utf-8-sig"),
    "chinese.csv": lambda: csv_text().encode("gb18030"),
    "utf16.csv": lambda: csv_text().encode("utf-16"),
    "semicolon.csv": lambda: csv_text(";").encode(),
    "a.tsv": lambda: csv_text("\t").encode(),
    "a.csv.gz": lambda: gzip.compress(csv_text().encode()),
    "a.jsonl.gz": lambda: gzip.compress(JSONL.encode("gb18030")),
    "named wrongly.jsonl": lambda: gzip.compress(JSONL.encode()),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "file.arrow": lambda: arrow(pyarrow.ipc.new_file),
    "a.xlsx": lambda: workbook(TABLE),
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FILES[name]())
    position = Position()
    found = list(scan(path, position=position))
    assert [row.value for row in found] == ROWS
    assert [row.number for row in found] == [1, 2] and not any(row.problem for row in found)
    assert position.done == position.total == path.stat().st_size


def test_xls(tmp_path: Path) -> None:
    """The fixture was written with xlwt 1.3, which nothing else here needs."""
    path = tmp_path / "a.xls"
    write(path, (Path(__file__).parent / "fixtures" / "table.xls").read_bytes())
    assert [row.value for row in scan(path)] == [{"question": "how?", "answer": "so"}, {"question": "n", "answer": 5}]


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes.md.gz", "notes.markdown"])
def test_a_text_is_one_document(tmp_path: Path, name: str) -> None:
    content = "# 标题\r\n\r\nOnce upon a time.\r\n".encode("gb18030")
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    [document] = import_rows(path).conversations
    assert document.messages[0].content == "# 标题\n\nOnce upon a time.\n" and document.kind == "text"


def test_a_folder_is_read_in_order_and_names_its_files(tmp_path: Path) -> None:
    for name, content in {
        "b/2.jsonl": JSONL, "a/1.csv": csv_text(), "README.md": "# About", ".git/x.json": "[]",
        "a/broken.xlsx": "no workbook", "c.json": "[1, {}]",
    }.items():  # fmt: skip
        write(tmp_path / name, content)
    found = [(row.file, row.number, row.problem) for row in scan(tmp_path)]
    assert [(file, number) for file, number, _ in found] == [
        ("a/1.csv", 1), ("a/1.csv", 2), ("a/broken.xlsx", 0), ("b/2.jsonl", 1), ("b/2.jsonl", 2), ("c.json", 1),
        ("c.json", 2),
    ]  # fmt: skip
    assert "not what its name says" in found[2][2]
    problems = [str(problem) for problem in import_rows(tmp_path).problems]
    assert problems[0].startswith("a/broken.xlsx: ") and problems[1].startswith("c.json, row 1: ")


def test_texts_of_a_folder_count_when_nothing_else_is_there(tmp_path: Path) -> None:
    for name in ("README.md", "b.txt", "a/c.md"):
        write(tmp_path / name, name)
    assert [file.name for file in data_files(tmp_path)] == ["c.md", "b.txt"]
    with pytest.raises(DataError, match="no file of data"):
        list(scan(write(tmp_path / "empty" / "x.py", "x").parent))


def test_a_sheet_by_name_and_a_formula_by_its_value(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["other"])
    sheet = book.create_sheet("Q&A")
    sheet.append(["question", "answer", None])
    sheet.append(["when?", "=CMD|'/c calc'!A0"])
    sheet.append([None, None])
    sheet.append([True, 2.5])
    book.save(tmp_path / "a.xlsx")
    rows = [row.value for row in scan(tmp_path / "a.xlsx", ReadOptions(sheet="Q&A"))]
    assert rows[0] == {"question": "when?", "answer": "=CMD|'/c calc'!A0"}
    assert rows[1] == {"question": True, "answer": 2.5}
    with pytest.raises(DataError, match="no sheet 'None'.*|Its sheets: Sheet, Q&A"):
        list(scan(tmp_path / "a.xlsx", ReadOptions(sheet="None")))


def test_lists_in_the_cells_of_a_table(tmp_path: Path) -> None:
    talk = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    path = write(tmp_path / "a.csv", 'id,messages\n1,"' + talk.replace('"', '""') + '"\n')
    assert import_rows(path).conversations[0].messages[1].content == "ho"


def test_csv_problems_name_their_row_and_the_others_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "question,answer\na,b\nc,d,e\n\nf\n" + "g,\0\n" + '"h" i,j\nk,"l\n')
    found = list(scan(path))
    assert [row.problem[:13] for row in found] == [
        "", "has 3 cells, ", "", "holds a NUL c", "is not valid ", "is not valid ",
    ]  # fmt: skip
    assert found[2].value == {"question": "f", "answer": ""}


def test_a_10_mb_cell_is_text(tmp_path: Path) -> None:
    long = "<script>" * (10 * 2**20 // 8)
    for name, content in {
        "a.csv": f'question,answer\nq,"{long}"\n',
        "a.jsonl": json.dumps({"question": "q", "answer": long}),
        "a.json": json.dumps([{"question": "q", "answer": long}]),
    }.items():
        assert import_rows(write(tmp_path / name, content)).conversations[0].messages[1].content == long


def test_one_damaged_character_makes_no_other_encoding(tmp_path: Path) -> None:
    content = JSONL.encode() + '{"question": "好'.encode()[:-1] + b'", "answer": "a"}\n'
    found = list(scan(write(tmp_path / "a.jsonl", content)))
    assert [row.value for row in found[:2]] == ROWS and "is not UTF-8: byte" in found[2].problem


def zip_of(entries: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return content.getvalue()


def with_entry(book: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(book)) as archive:
        entries = {each: archive.read(each) for each in archive.namelist()}
    return zip_of(entries | {name: change(entries.get(name, b""))})


LAUGHS = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
SHEET = "xl/worksheets/sheet1.xml"
BOOK = workbook(TABLE)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "bomb.xlsx": lambda: with_entry(BOOK, "xl/media/x.bin", lambda _: b"\0" * (80 * 2**20)),
    "entities.xlsx": lambda: with_entry(BOOK, SHEET, lambda xml: LAUGHS + xml.replace(b"how", b"&b;")),
    "cut.xlsx": lambda: BOOK[:-200],
    "no workbook.xlsx": lambda: zip_of({"a.txt": b"hello"}),
    "no sheet.xlsx": lambda: with_entry(BOOK, SHEET, lambda _: b"<x/>"),
    "broken sheet.xlsx": lambda: with_entry(BOOK, SHEET, lambda xml: xml[: len(xml) // 2]),
    "header.xlsx": lambda: workbook([["question", "answer"]]),
    "encrypted.xlsx": lambda: tables_ole("EncryptedPackage"),
    "broken.xls": lambda: tables_ole("Workbook"),
    "text.xls": lambda: b"question\tanswer\n",
    "cut.parquet": lambda: parquet()[:-40],
    "short.parquet": lambda: b"PAR1",
    "empty.parquet": lambda: b"",
    "cut.arrow": lambda: arrow()[:100],
    "cut.jsonl.gz": lambda: gzip.compress(JSONL.encode() * 1000)[:-20],
    "twice.jsonl.gz": lambda: gzip.compress(gzip.compress(JSONL.encode())),
    "no.jsonl.gz": lambda: b"\x1f\x8b\x08\0rest",
    "a.pdf": lambda: b"%PDF-1.7 ...",
    "empty.csv": lambda: b"",
    "header.csv": lambda: b"question,answer\n",
    "empty.txt": lambda: b" \n",
    "empty.md": lambda: b"",
    "latin.txt": lambda: "é è".encode("latin-1"),
    "cut.json": lambda: json.dumps(ROWS).encode()[:-5],
    "two.json": lambda: b"[{}] [{}]",
    "comma.json": lambda: b"[{},]",
    "deep.json": lambda: b"[" + b"[" * 100_000,
    "deep.jsonl": lambda: b'{"a":' * 100_000,
    "cut utf-16.json": lambda: json.dumps(ROWS).encode("utf-16")[:-1],
}


def tables_ole(stream: str) -> bytes:
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 504 + stream.encode("utf-16-le") + b"\0" * 2000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, HOSTILE[name]())
    with pytest.raises(DataError) as caught:
        for row in scan(path):
            if row.problem:
                raise DataError(f"{path.name}: {row.problem}")
    assert name in str(caught.value)


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_UNPACKED_BYTES", 2**20)
    bomb = write(tmp_path / "bomb.jsonl.gz", gzip.compress(b" " * (64 * 2**20)))
    with pytest.raises(DataError, match=r"bomb.jsonl.gz unpacks to \d+ times its size"):
        list(scan(bomb))
    monkeypatch.setattr(streams, "FREE_UNPACKED_BYTES", 2**40)
    monkeypatch.setattr(streams, "MAX_UNPACKED_BYTES", 8 * 2**20)
    with pytest.raises(DataError, match=r"more than 8.0 MB"):
        list(scan(bomb))


def test_rows_longer_than_a_row_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_rows, tables, sys.modules["studio.data.rows"], sys.modules["studio.data.files"]):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    long, good = json.dumps({"text": "x" * 5000}), json.dumps({"text": "short"})
    found = list(scan(write(tmp_path / "a.jsonl", f"{good}\n{long}\n{good}\n")))
    assert [bool(row.problem) for row in found] == [False, True, False] and found[2].line == 3
    assert "longer than" in found[1].problem
    with pytest.raises(DataError, match="longer than"):
        list(scan(write(tmp_path / "a.txt", long)))
    assert "field larger" in next(scan(write(tmp_path / "a.csv", f"text\n{long}\n"))).problem


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_document_is_read_the_same_in_pieces_of_any_size(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": 'x\\ud83d"\\n' * 3, "b": [1, -2.5e-3, True, None]}, {"c": {"d": "你好"}}, 12, "tail"]
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(json_rows, "WHOLE_DOCUMENT_BYTES", 0)
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        assert [row.value for row in scan(write(tmp_path / "a.json", text))] == rows
    wrapped = {"version": "1", "other": [1, 2], "data": rows[:2], "more": {}}
    assert [row.value for row in scan(write(tmp_path / "b.json", json.dumps(wrapped, indent=1)))] == rows[:2]
    with pytest.raises(DataError, match="with 2 lists"):
        list(scan(write(tmp_path / "c.json", json.dumps({"a": [{}], "b": [{}]}, indent=1))))
    with pytest.raises(DataError, match=r"d.json, row 2: is not valid JSON: .* at line 3, column"):
        list(scan(write(tmp_path / "d.json", '[\n{"a": 1},\n{"a" 2}]')))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"question": "头疼怎么办？"}\n'),
        ("a.csv", "问题,回答\n头疼怎么办？,多休息。\n"),
        ("a.txt", "头疼怎么办？"),
    ],
)
def test_another_encoding_than_the_one_named_is_said_once(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text.encode("gb18030"))
    with pytest.raises(DataError, match=f"{name} is not in utf-8, but in gb18030. Leave the encoding out"):
        list(scan(path, ReadOptions(encoding="utf-8")))
    assert not any(row.problem for row in scan(path, ReadOptions(encoding="gb18030")))


def test_a_name_that_says_gzip_wrongly_and_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a.jsonl.gz is not gzip"):
        list(scan(write(tmp_path / "a.jsonl.gz", "no gzip at all")))
    with pytest.raises(DataError, match="no file '.*nope.csv'") as raised:
        list(scan(tmp_path / "nope.csv"))
    assert "Allowed" not in str(raised.value)


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    """150 MB as a list, an object and a table, in a process that may take 100 MB more than it has after its imports."""
    row = {"instruction": "x" * 400, "input": "", "output": "y" * 600}
    text = ",\n".join([json.dumps(row)] * 150_000)
    for name, content in {
        "a.json": f"[{text}]",
        "b.json": f'{{"data": [{text}]}}',
        "c.csv": csv_of(row, 150_000),
    }.items():
        write(tmp_path / name, content)
        code = (
            "import re, sys; from studio.data.files import scan\n"
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "before = peak()  # getrusage would tell the peak of the process that started this one\n"
            "count = sum(not row.problem for row in scan(sys.argv[1]))\n"
            "print(count, peak() - before)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, cwd=REPOSITORY)
        count, kilobytes = map(int, done.stdout.split())
        assert count == 150_000 and kilobytes < 100_000, f"{name} took {kilobytes} KB"


def csv_of(row: dict[str, str], times: int) -> str:
    return ",".join(row) + "\n" + (",".join(row.values()) + "\n") * times


def damaged(content: bytes, seed: int) -> bytes:
    """Some bytes changed, cut or repeated."""
    dice = random.Random(seed)
    changed = bytearray(content)
    for _ in range(dice.randint(1, 8)):
        start = dice.randrange(len(changed) + 1)
        changed[start : start + dice.choice([0, 1, 1, 4, 50])] = dice.randbytes(dice.choice([0, 1, 1, 3]))
    return bytes(changed)


@ANY_FILE
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 10**6))
def test_damaged_files_give_rows_or_a_data_error(tmp_path: Path, name: str, seed: int) -> None:
    _rows_or_error(write(tmp_path / name, damaged(FILES[name](), seed)))


@pytest.mark.parametrize("name", ["a.arrow", "file.arrow", "a.parquet"])
def test_damaged_offsets_do_not_end_the_process(tmp_path: Path, name: str) -> None:
    """Arrow trusts the offsets of a file unless told to look: seed 327 of a.arrow read where there was no memory."""
    whole = FILES[name]()
    for seed in range(400):
        _rows_or_error(write(tmp_path / name, damaged(whole, seed)))


ANY_BYTES = st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
ANY_SUFFIX = st.sampled_from("csv tsv json jsonl txt md parquet xlsx xls arrow gz x".split())


@ANY_FILE
@given(suffix=ANY_SUFFIX, content=ANY_BYTES)
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    _rows_or_error(write(tmp_path / f"any.{suffix}", content))


def _rows_or_error(path: Path) -> None:
    try:
        imported = import_rows(path)
    except DataError as error:
        assert path.name in str(error)
    else:
        assert imported.conversations or imported.problems
        assert all(str(problem).startswith("row ") for problem in imported.problems)


def test_no_file_is_written_or_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workbook that names remote pictures and other files."""
    monkeypatch.setattr("socket.socket.connect", _refuse)
    link = b'<hyperlink ref="A1" xmlns:r="http://example.com/r" r:id="rId1"/>'
    book = with_entry(
        BOOK, SHEET, lambda xml: xml.replace(b"</worksheet>", b"<hyperlinks>" + link + b"</hyperlinks></worksheet>")
    )
    before = sorted(tmp_path.rglob("*"))
    path = write(tmp_path / "a.xlsx", book)
    assert len(list(scan(path))) == 2
    assert sorted(tmp_path.rglob("*")) == [*before, path]


def _refuse(*_: object) -> Iterator[None]:
    raise AssertionError("nothing may be fetched")
