"""The token cache gives back what was encoded, notices every change and every damage, and can be cleaned."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import write_model_folder

from studio.data import cache, encoding, token_files
from studio.data.cache import TokenCache, delete, delete_all, listed, open_or_build
from studio.data.formats import Conversation, Message, write_conversations
from studio.data.named import load_template
from studio.data.template import ChatTemplate
from studio.data.token_files import TokenFiles, TokenWriter
from studio.data.tokens import IGNORE_INDEX, Example, TextTokenizer, encode_conversation
from studio.errors import DataError, ProjectError

ROWS = [("Who are you?", "I am Luna."), ("你是谁？", "我是 Luna。"), ("Who are you?", "I am Luna."), ("x", "y " * 90)]
Open = Callable[..., TokenCache]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), "byte_level")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "identity.jsonl", ROWS)


@pytest.fixture
def open_cache(tmp_path: Path, source: Path, model: Path) -> Open:
    """`open_cache(max_length=32, …)`: the tokens of `source` as the studio opens them."""

    def open_(**changes: object) -> TokenCache:
        values = {
            "template": ChatTemplate.load(model),
            "tokenizer": TextTokenizer.load(model),
            "max_length": 64,
            "loss_on": "assistant",
        }
        return open_or_build(tmp_path, "identity", source, **(values | changes))  # type: ignore[arg-type]

    return open_


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_conversations(path, [Conversation((Message("user", q), Message("assistant", a))) for q, a in rows])
    return path


def keys(root: Path) -> list[str]:
    return [info.key for info in listed(root)]


def refuse(*_: object) -> None:
    raise AssertionError("the tokens are built although they are there")


def test_rows_come_back_as_they_are_encoded(open_cache: Open, model: Path) -> None:
    tokens = open_cache()
    template, tokenizer = ChatTemplate.load(model), TextTokenizer.load(model)
    chats = [Conversation((Message("user", q), Message("assistant", a))) for q, a in ROWS]
    assert list(tokens.rows()) == [encode_conversation(chat, template, tokenizer, 64) for chat in chats]
    assert tokens.rows()[3].truncated and not tokens.rows()[0].truncated


def test_what_lint_wants_to_know_is_counted(open_cache: Open) -> None:
    info = open_cache(max_length=16).info
    rows = list(open_cache(max_length=16).rows())
    assert (info.num_rows, info.num_distinct, info.longest) == (4, 3, 16)
    assert info.num_truncated == sum(row.truncated for row in rows) == 4
    assert info.num_tokens == sum(len(row.input_ids) for row in rows)
    assert info.num_trained_tokens == sum(row.num_trained_tokens for row in rows)
    assert info.num_untrained == sum(not row.num_trained_tokens for row in rows) > 0
    assert open_cache(max_length=16).untrained() == [
        number for number, row in enumerate(rows, start=1) if not row.num_trained_tokens
    ]
    assert list(open_cache(max_length=16).trainable()) == [row for row in rows if row.num_trained_tokens]


def test_built_once_and_used_again(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(open_cache().rows())
    monkeypatch.setattr(cache, "_build", refuse)
    assert list(open_cache().rows()) == first


def test_a_row_that_repeats_is_encoded_once(open_cache: Open, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    each = encoding.encode_each
    monkeypatch.setattr(encoding, "encode_each", lambda rows, *rest: each(map(encoded_into(encoded), rows), *rest))
    write(source, [ROWS[0], ROWS[1]] * 1000)
    tokens = open_cache()
    assert len(encoded) == 2 and len(tokens.rows()) == 2000
    assert tokens.rows()[1998] == tokens.rows()[0] != tokens.rows()[1999]


def encoded_into(seen: list) -> Callable[[Conversation], Conversation]:
    return lambda conversation: seen.append(conversation) or conversation


def test_more_different_rows_than_are_remembered(
    open_cache: Open, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_KNOWN_ROWS", 1)
    rows = [("a", "1"), ("b", "2"), ("b", "2"), ("a", "1"), ("b", "2")]
    write(source, rows)
    texts = [tuple(example.input_ids) for example in open_cache().rows()]
    assert len(set(texts)) == 2 and texts[0] == texts[3] and texts[1] == texts[2] == texts[4]
    assert open_cache().info.num_distinct == 4


@pytest.mark.parametrize("change", ["row", "max_length", "loss_on", "template", "special token", "tokenizer", "code"])
def test_every_change_gives_another_cache(
    change: str,
    open_cache: Open,
    source: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = open_cache().info.key
    template = ChatTemplate.load(model)
    changes: dict[str, object] = {"max_length": {"max_length": 63}, "loss_on": {"loss_on": "last"}}.get(change, {})
    if change == "row":
        write(source, [*ROWS[:-1], ("x", "z")])
    elif change == "template":
        changes = {"template": load_template("qwen_chat", model)}
    elif change == "special token":
        changes = {"template": replace(template, special_tokens={**template.special_tokens, "bos_token": ""})}
    elif change == "tokenizer":
        changes = {"tokenizer": TextTokenizer.load(write_model_folder(tmp_path / "other", "sentencepiece"))}
    elif change == "code":
        monkeypatch.setattr(cache, "code_fingerprint", lambda: "other")
    assert open_cache(**changes).info.key != before
    assert len(keys(tmp_path)) == 2


def test_a_template_with_a_date_is_another_one_tomorrow(
    open_cache: Open, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = replace(ChatTemplate.load(model), source="{{ strftime_now('%d') }}" + ChatTemplate.load(model).source)
    before = open_cache(template=template).info.key
    assert open_cache(template=template).info.key == before

    class Tomorrow(cache.date):  # type: ignore[misc]
        @classmethod
        def today(cls) -> cache.date:
            return cls(2100, 1, 1)

    monkeypatch.setattr(cache, "date", Tomorrow)
    assert open_cache(template=template).info.key != before


@pytest.mark.parametrize("file", [*token_files.FILES, cache.META])
@pytest.mark.parametrize("how", ["bit", "short", "gone"])
def test_damage_is_noticed_and_mended(
    file: str, how: str, open_cache: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = list(open_cache().rows())
    path = tmp_path / cache.FOLDER / keys(tmp_path)[0] / file
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[:-3])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert list(open_cache().rows()) == expected
    assert "damaged" in capsys.readouterr().out
    assert path.read_bytes()[:1] == content[:1]


def test_a_build_that_is_broken_off_leaves_nothing(open_cache: Open, tmp_path: Path) -> None:
    def stop(num_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cache(progress=stop)
    assert not listed(tmp_path) and not list((tmp_path / cache.FOLDER).iterdir())
    assert open_cache().info.num_rows == 4


def test_progress_counts_rows_to_the_last(open_cache: Open, source: Path) -> None:
    write(source, [(f"q{number}", "a") for number in range(600)])
    seen: list[int] = []
    open_cache(progress=seen.append)
    assert seen == [0, 256, 512, 600]


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", "row 3: .*JSON"), ('{"messages": []}', "row 3: .*empty"), (json.dumps({"messages": 3}), "row 3: .*list")],
)
def test_a_row_that_cannot_be_read_is_named(line: str, told: str, open_cache: Open, source: Path) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join([*lines[:2], line, *lines[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=f"'identity', {told}"):
        open_cache()


def test_a_row_that_the_template_refuses_is_named(open_cache: Open, model: Path) -> None:
    refusing = replace(
        ChatTemplate.load(model),
        source="{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        + ChatTemplate.load(model).source,
    )
    with pytest.raises(DataError, match="'identity', row 4: .*no x"):
        open_cache(template=refusing)


def test_listed_newest_first_with_size_and_deleted(open_cache: Open, tmp_path: Path) -> None:
    assert listed(tmp_path) == []
    keys_made = [open_cache(max_length=length).info.key for length in (32, 64)]
    found = listed(tmp_path)
    assert [info.key for info in found] == keys_made[::-1]
    assert all(info.dataset == "identity" and info.num_bytes > 500 for info in found)
    delete(tmp_path, keys_made[0])
    assert keys(tmp_path) == keys_made[1:]
    with pytest.raises(DataError, match="no token cache"):
        delete(tmp_path, keys_made[0])
    with pytest.raises((DataError, ProjectError)):
        delete(tmp_path, "../data")
    assert (tmp_path / "data").is_dir()
    assert delete_all(tmp_path) == found[0].num_bytes and not listed(tmp_path)


def test_a_damaged_cache_is_listed_and_can_be_deleted(open_cache: Open, tmp_path: Path) -> None:
    key = open_cache().info.key
    (tmp_path / cache.FOLDER / key / cache.META).write_text("[]", encoding="utf-8")
    (info,) = listed(tmp_path)
    assert info.key == key and info.num_bytes and not info.num_rows
    delete(tmp_path, key)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    made = []
    for ids in draw(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=20), min_size=1, max_size=12)):
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, mask, strict=True)]
        made.append(Example(ids, labels, draw(st.booleans())))
    return made


@settings(deadline=None)
@given(stored=examples(), flush=st.integers(1, 40), data=st.data())
def test_files_give_back_any_examples(
    stored: list[Example], flush: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    largest = max(max(example.input_ids) for example in stored)
    rows = data.draw(st.lists(st.integers(0, len(stored) - 1), max_size=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "FLUSH_TOKENS", flush)
        writer = TokenWriter(folder, largest)
        for example in stored:
            writer.add(example)
        writer.close(rows, range(1, len(rows) + 1))
    files = TokenFiles(folder, writer.dtype)
    assert [files.row(row) for row in range(files.num_rows)] == [stored[number] for number in rows]
    assert files.trained_tokens().tolist() == [stored[number].num_trained_tokens for number in rows]
    assert files.lengths().tolist() == [len(stored[number].input_ids) for number in rows]


@pytest.mark.parametrize(("largest_id", "size"), [(65_535, 2), (65_536, 4)])
def test_ids_take_two_bytes_where_that_is_enough(largest_id: int, size: int, tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, largest_id)
    writer.add(Example([largest_id], [largest_id]))
    writer.close([0], [1])
    assert (tmp_path / token_files.IDS).stat().st_size == size
    assert TokenFiles(tmp_path, writer.dtype).row(0).input_ids == [largest_id]


def test_documents_are_joined_and_split(open_cache: Open, source: Path, model: Path) -> None:
    """Every token of raw text is trained, in order, repeated rows too; chats beside it keep their rows' numbers."""
    texts = ["Luna " * 30, "Tokyo.", "Tokyo.", "Who?"]
    documents = [Conversation((Message("assistant", text),), {"kind": "text"}) for text in texts]
    chat, silent = (
        Conversation((Message("user", "x"), Message("assistant", "I am Luna.", trained))) for trained in (None, False)
    )
    write_conversations(source, [*documents[:2], chat, documents[2], silent, documents[3]])
    template, tokenizer = ChatTemplate.load(model), TextTokenizer.load(model)
    tokens = open_cache(max_length=32)
    rows = list(tokens.rows())
    assert rows[:2] == [encode_conversation(each, template, tokenizer, 32) for each in (chat, silent)]
    assert tokens.untrained() == [5]
    joined = [token for row in rows[2:] for token in row.input_ids]
    assert joined == [token for each in documents for token in encode_conversation(each, template, tokenizer).input_ids]
    assert all(row.labels == row.input_ids and not row.truncated for row in rows[2:])
    assert [len(row.input_ids) for row in rows[2:-1]] == [32] * (len(rows) - 3)
    info = tokens.info
    assert (info.num_rows, info.num_documents, info.num_sequences, info.num_untrained) == (6, 4, len(rows) - 2, 1)


def test_slices_of_rows_stay_on_the_disk(open_cache: Open) -> None:
    rows = open_cache().rows()
    assert isinstance(rows[1:3], token_files.StoredRows) and list(rows[1:3]) == [rows[1], rows[2]]
    assert rows == list(rows) and rows != list(rows)[:-1] and rows[1:] != rows[:-1]
    assert np.array_equal(rows[1:3].rows, [1, 2])
