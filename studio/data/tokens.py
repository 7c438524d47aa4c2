"""Token ids and labels of a conversation, as the preview shows them and the trainer trains them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from studio.data.conversation import Conversation, Message, digest_line
from studio.data.named import Template
from studio.data.old_tokenizers import made_tokenizer
from studio.data.pretrain import document
from studio.data.segments import ChatMessage, Segment
from studio.data.word_cache import WordCache, first_token
from studio.errors import DataError

IGNORE_INDEX = -100
BATCH_ROWS = 256
BATCH_CHARACTERS = 1_000_000

Encoded = tuple[list[int], list[int]]
Written = tuple[list[Segment] | DataError, bool]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation. labels[i] is input_ids[i] where trained, else IGNORE_INDEX.

    `is_document`: raw text, to be joined with others and split (`pretrain.sequences`).
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    is_document: bool = False

    @property
    def num_trained_tokens(self) -> int:
        """Labels that a model can be asked for: the first token has nothing before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class TextTokenizer:
    """The fast tokenizer of a model folder. Control tokens written by a message stay ordinary text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        for each in (self._tokenizer, self._plain):
            each.no_truncation()
            each.no_padding()
        self._plain.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder().values()
        self.control_tokens = tuple(token.content for token in added if token.special)
        self.control_ids = {tokenizer.token_to_id(token) for token in self.control_tokens}
        self._words = WordCache(self._tokenizer) if WordCache.fits(self._tokenizer) else None
        self._newline = self._tokenizer.encode("\n", add_special_tokens=False).ids

    @classmethod
    def load(cls, model_folder: Path) -> "TextTokenizer":
        """Read tokenizer.json, or make it of an older model's tokenizer.model; DataError when it cannot be had."""
        path = Path(model_folder) / "tokenizer.json"
        source = path if path.is_file() else made_tokenizer(path.parent)
        try:
            tokenizer = Tokenizer.from_file(str(source))
        except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
            raise DataError(f"tokenizer.json of {path.parent.name!r} cannot be read: {error}.") from error
        _add_missing_tokens(tokenizer, path.with_name("tokenizer_config.json"))
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self._tokenizer.save(str(path))

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """What `to_json` wrote."""
        return cls(Tokenizer.from_str(text))

    def to_json(self) -> str:
        """All of it, for another process."""
        return str(self._tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def largest_id(self) -> int:
        """The largest id there is; with gaps between ids it is more than their number."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that shapes the ids."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, None when there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens count as such; nothing is added."""
        return self.encode_segments([Segment(text, False)])[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, for display; part of a character shows as U+FFFD."""
        return [str(self._tokenizer.decode([each], skip_special_tokens=False)) for each in ids]

    def encode_segments(self, segments: Iterable[Segment]) -> Encoded:
        """Ids and labels of a rendered chat. A token is trained when its first character is.

        Text between literal pieces is encoded as a whole, so the ids are those of the whole text.
        """
        [encoded] = self.encode_many([list(segments)])
        return encoded

    def encode_many(self, chats: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """As `encode_segments` for many chats at once, on all cores. Raises DataError when one cannot be encoded."""
        runs = [_runs(segments) for segments in chats]
        usual = [run for chat in runs for run in chat if run.usual]
        try:
            found = iter(self._encode_texts([run.text for run in usual], [run.places for run in usual]))
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError("The text holds half a character (a lone surrogate).", "Correct the row.") from error
        return [
            _joined(_labelled(run, *next(found)) if run.usual else self._unusual(run) for run in chat) for chat in runs
        ]

    def _encode_texts(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Encoded]:
        """For each text its ids, and for each of its places the first token that begins there or later."""
        if self._words:
            return self._words.encode(texts, places)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            (encoding.ids, [first_token(encoding, place) for place in own])
            for encoding, own in zip(encodings, places, strict=True)
        ]

    def _unusual(self, run: "_Run") -> Encoded:
        """A run with ids of its own, with control tokens switched off, or going on after one with those."""
        if ids := run.segments[0].ids:
            return list(ids), list(ids) if run.segments[0].trained else [IGNORE_INDEX] * len(ids)
        text = run.text
        if run.segments[0].literal and len(text) > 1 and self._makes_control_tokens(text):
            letters = [replace(each, text=letter) for each in run.segments for letter in each.text]
            return _joined(self._unusual(_Run([each], run.first and not number)) for number, each in enumerate(letters))
        encode = self._plain.encode if run.segments[0].literal else self._tokenizer.encode
        try:
            # SentencePiece tokenizers put a space before a text; after a line break they do not.
            encoding = encode(text if run.first else "\n" + text, add_special_tokens=False)
            skip, shift = (0, 0) if run.first else (len(self._newline), 1)
            if encoding.ids[:skip] != self._newline[:skip]:
                encoding, skip, shift = encode(text, add_special_tokens=False), 0, 0
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError("The text holds half a character (a lone surrogate).", "Correct the row.") from error
        ends = [first_token(encoding, place + shift) - skip for place in run.places]
        return _labelled(run, encoding.ids[skip:], ends)

    def _makes_control_tokens(self, text: str) -> bool:
        """Whether plain text becomes one by mere merges: converted SentencePiece vocabularies spell <s> that way."""
        return not self.control_ids.isdisjoint(self._plain.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring segments that are encoded as one text; `first` of its part."""

    segments: list[Segment]
    first: bool

    @property
    def usual(self) -> bool:
        return self.first and not self.segments[0].literal and not self.segments[0].ids

    @property
    def text(self) -> str:
        return "".join([segment.text for segment in self.segments])

    @property
    def places(self) -> list[int]:
        """Characters at which what is trained begins or ends."""
        found, position = [], 0
        for before, segment in pairwise(self.segments):
            position += len(before.text)
            if before.trained != segment.trained:
                found.append(position)
        return found


def _runs(segments: Sequence[Segment]) -> list[_Run]:
    runs: list[_Run] = []
    for _, group in groupby(segments, key=lambda segment: (segment.part, segment.literal)):
        run = list(group)
        runs.append(_Run(run, not runs or runs[-1].segments[0].part != run[0].part))
    return runs


def _labelled(run: _Run, ids: list[int], ends: list[int]) -> Encoded:
    """Ids and labels; `ends` are the tokens at which what is trained begins or ends."""
    labels: list[int] = []
    trained = run.segments[0].trained
    for end in [*ends, len(ids)]:
        labels += ids[len(labels) : end] if trained else [IGNORE_INDEX] * (end - len(labels))
        trained = not trained
    return ids, labels


def _joined(parts: Iterable[Encoded]) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for part_ids, part_labels in parts:
        ids += part_ids
        labels += part_labels
    return ids, labels


def encode_conversation(
    conversation: Conversation,
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> Example:
    """One conversation as ids and labels; what exceeds `max_length` tokens is cut off at the end.

    Raw text (kind "text") is a document of `pretrain`: it is not cut, as training joins and splits documents.
    Raises DataError when the template refuses the messages.
    """
    [example] = encode_batch([conversation], template, tokenizer, max_length, loss_on)
    if isinstance(example, DataError):
        raise example
    return example


def encode_batch(
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> list[Example | DataError]:
    """As `encode_conversation` for some hundred conversations at once; one that fails gives its DataError."""
    return _examples(_written(conversations, template, tokenizer, loss_on), tokenizer, max_length)


def encode_conversations(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> Iterator[Example]:
    """As `encode_each`; the first conversation that fails raises its DataError, with the row's number from 1."""
    examples = encode_each(conversations, template, tokenizer, max_length, loss_on)
    for row_number, example in enumerate(examples, start=1):
        if isinstance(example, DataError):
            raise DataError(f"Row {row_number}: {example.message}", example.hint) from example
        yield example


def encode_each(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> Iterator[Example | DataError]:
    """Yield for each conversation, in order, its example or why there is none.

    One batch is rendered while the one before is tokenised. Examples without a trained token are yielded too
    (`num_trained_tokens` is 0): the caller leaves them out and says so.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="render") as renderer:
        write = partial(_written, template=template, tokenizer=tokenizer, loss_on=loss_on)
        for written in _one_ahead(renderer, write, _batches(conversations)):
            yield from _examples(written, tokenizer, max_length)


def encode_prompt(messages: Sequence[ChatMessage], template: Template, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a chat up to where the assistant answers. Control tokens inside a message stay ordinary text.

    Raises DataError when the template refuses the messages.
    """
    segments = template.segments(messages, "all", tokenizer.control_tokens)
    opening = template.render(messages, add_generation_prompt=True).removeprefix(template.render(messages))
    last = segments[-1].part if segments else 0
    return tokenizer.encode_segments([*segments, *([Segment(opening, True, part=last)] if opening else [])])[0]


def rendered(conversation: Conversation, template: Template, tokenizer: TextTokenizer) -> str:
    """The text of a conversation with its control tokens, as it is tokenised. Raises DataError."""
    [(segments, _)] = _written([conversation], template, tokenizer, "all")
    if isinstance(segments, DataError):
        raise segments
    return "".join(segment.text for segment in segments)


@dataclass(frozen=True)
class Habits:
    """What a template does with every row: train something after an answer, write calls of tools and their definitions.

    Where a template does not tell, because it refuses the question, it counts as doing it.
    """

    trains_end: bool = True
    writes_calls: bool = True
    writes_tools: bool = True


def habits_of(template: Template, loss_on: str) -> Habits:
    """Found by a row of each kind, written by the template itself."""
    return Habits(_trains_end(template, loss_on), *_writes_tools(template, loss_on))


def _trains_end(template: Template, loss_on: str) -> bool:
    answer = "Yes, it is."
    try:
        segments = template.segments([Message("user", "Is it?"), Message("assistant", answer)], loss_on)
    except DataError:
        return True
    return bool("".join(segment.text for segment in segments if segment.trained).rpartition(answer)[2])


def _writes_tools(template: Template, loss_on: str) -> tuple[bool, bool]:
    """(calls, definitions)."""
    call = json.dumps([{"id": "1", "type": "function", "function": {"name": "call_it", "arguments": {"a": 1}}}])
    tool = {"type": "function", "function": {"name": "define_it", "description": "It.", "parameters": {}}}
    messages = (Message("user", "Do it."), Message("assistant", "", tool_calls=call))
    [segments] = template.segments_of([Conversation(messages, {"tools": [tool]})], loss_on)
    if isinstance(segments, DataError):
        return True, True
    text = "".join(segment.text for segment in segments)
    return "call_it" in text, "define_it" in text


def _written(
    conversations: Sequence[Conversation], template: Template, tokenizer: TextTokenizer, loss_on: str
) -> list[Written]:
    """Each conversation's segments or why there are none, and whether it is a document."""
    chats = [conversation for conversation in conversations if conversation.kind != "text"]
    pieces = iter(template.segments_of(chats, loss_on, tokenizer.control_tokens))
    eos = template.special_tokens.get("eos_token", "")
    return [
        (_document(conversation, eos, tokenizer), True) if conversation.kind == "text" else (next(pieces), False)
        for conversation in conversations
    ]


def _document(conversation: Conversation, eos: str, tokenizer: TextTokenizer) -> list[Segment] | DataError:
    try:
        return document(conversation.messages[0].content, eos, tokenizer.control_tokens)
    except DataError as error:
        return error


def _examples(
    written: Sequence[Written], tokenizer: TextTokenizer, max_length: int | None
) -> list[Example | DataError]:
    """Tokenise what was written; a text that cannot be encoded costs its own row only."""
    good = [segments for segments, _ in written if not isinstance(segments, DataError)]
    try:
        encoded = iter(tokenizer.encode_many(good))
    except DataError as error:
        if len(written) == 1:
            return [error]
        return [example for each in written for example in _examples([each], tokenizer, max_length)]
    return [
        segments
        if isinstance(segments, DataError)
        else Example(*next(encoded), is_document=True)
        if is_document
        else _cut(*next(encoded), max_length)
        for segments, is_document in written
    ]


def _cut(ids: list[int], labels: list[int], max_length: int | None) -> Example:
    if max_length is None or len(ids) <= max_length:
        return Example(ids, labels)
    return Example(ids[:max_length], labels[:max_length], truncated=True)


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Up to BATCH_ROWS conversations, fewer when they are long."""
    batch: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        batch.append(conversation)
        characters += sum(len(message.content) for message in conversation.messages)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _one_ahead(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, the next one being made while the caller uses the last."""
    pending = None
    for item in items:
        following = pool.submit(work, item)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """sha256 of the canonical rows, key order ignored: equal data, equal fingerprint."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(digest_line(conversation))
    return digest.hexdigest()


def _add_missing_tokens(tokenizer: Tokenizer, config_path: Path) -> None:
    """Older models keep some added tokens in tokenizer_config.json alone."""
    if not config_path.is_file():
        return
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        declared = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{config_path.name} of {config_path.parent.name!r} cannot be read: {error}.") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in declared:
        if isinstance(token, dict) and token.get("content") not in known:
            tokenizer.add_tokens([_added_token(token)])


def _added_token(token: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(str(token.get("content")), **{flag: bool(token.get(flag)) for flag in flags})
