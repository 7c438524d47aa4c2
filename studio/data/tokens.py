"""Token ids and labels of a conversation, as the preview shows them and the trainer trains them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from studio.data.formats import Conversation, canonical_json
from studio.data.template import ChatTemplate, Segment
from studio.errors import DataError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation. labels[i] is input_ids[i] where trained, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

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
        self._newline = self._tokenizer.encode("\n", add_special_tokens=False).ids

    @classmethod
    def load(cls, model_folder: Path) -> "TextTokenizer":
        """Read tokenizer.json; DataError when it is missing or damaged."""
        path = Path(model_folder) / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"The model {path.parent.name!r} has no tokenizer.json.",
                "Load it with AutoTokenizer and save it once with save_pretrained; that writes the file.",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
            raise DataError(f"tokenizer.json of {path.parent.name!r} cannot be read: {error}.") from error
        _add_missing_tokens(tokenizer, path.with_name("tokenizer_config.json"))
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, None when there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens count as such; nothing is added."""
        return self._encode([Segment(text, False)], first=True)[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, for display; part of a character shows as U+FFFD."""
        return [str(self._tokenizer.decode([each], skip_special_tokens=False)) for each in ids]

    def encode_segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool]]:
        """(ids, trained) of a rendered chat. A token is trained when its first character is.

        Text between literal pieces is encoded as a whole, so the ids are those of the whole text.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for _, run in groupby(segments, key=lambda segment: segment.literal):
            run_ids, run_trained = self._encode(list(run), first=not ids)
            ids += run_ids
            trained += run_trained
        return ids, trained

    def _encode(self, run: list[Segment], first: bool) -> tuple[list[int], list[bool]]:
        """Encode neighbouring segments as one text, literal ones with control tokens switched off."""
        text = "".join(segment.text for segment in run)
        encode = self._plain.encode if run and run[0].literal else self._tokenizer.encode
        mask = b"".join(bytes([segment.trained]) * len(segment.text) for segment in run)
        try:
            # SentencePiece tokenizers put a space before a text; after a line break they do not.
            encoding = encode(text if first else "\n" + text, add_special_tokens=False)
            skip, shift = (0, 0) if first else (len(self._newline), 1)
            if encoding.ids[:skip] != self._newline[:skip]:
                encoding, skip, shift = encode(text, add_special_tokens=False), 0, 0
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError("The text holds half a character (a lone surrogate).", "Correct the row.") from error
        starts = [max(0, start - shift) for start, _ in encoding.offsets[skip:]]
        return encoding.ids[skip:], [bool(mask[min(start, len(mask) - 1)]) for start in starts]


def encode_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> Example:
    """One conversation as ids and labels; what exceeds `max_length` tokens is cut off at the end.

    Raises DataError when the template refuses the messages.
    """
    segments = template.segments(conversation.messages, loss_on, tokenizer.control_tokens)
    ids, trained = tokenizer.encode_segments(segments)
    labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, trained, strict=True)]
    return Example(ids[:max_length], labels[:max_length], max_length is not None and len(ids) > max_length)


def encode_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    loss_on: str = "assistant",
) -> Iterator[Example]:
    """Yield one example per conversation, in order; DataError names the row, counted from 1.

    Examples without a trained token are yielded too (`num_trained_tokens` is 0): the caller leaves them out
    and says so.
    """
    for row_number, conversation in enumerate(conversations, start=1):
        try:
            yield encode_conversation(conversation, template, tokenizer, max_length, loss_on)
        except DataError as error:
            raise DataError(f"Row {row_number}: {error.message}", error.hint) from error


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """sha256 of the canonical rows, key order ignored: equal data, equal fingerprint."""
    digest = hashlib.sha256()
    for conversation in conversations:
        row = json.loads(canonical_json(conversation.to_row()))
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
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
