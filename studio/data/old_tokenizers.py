"""Tokenizers of models that bring no tokenizer.json: from sentencepiece's tokenizer.model, or Qwen's qwen.tiktoken.

Both are data, and are read as such; the Python classes that some models bring for them are not run. What is made is
kept below the models' folder, by the hash of what it was made from.
"""

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from studio.errors import DataError
from studio.paths import atomic_write_text, models_root

SENTENCEPIECE, TIKTOKEN = "tokenizer.model", "qwen.tiktoken"
MAX_BYTES = 64 * 2**20
MADE_BY = 1
"""Counts changes of what is made from the same file."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def can_be_made(folder: Path) -> bool:
    """Whether a folder without tokenizer.json has what one can be made from."""
    return any((folder / name).is_file() for name in (SENTENCEPIECE, TIKTOKEN))


def made_tokenizer(folder: Path) -> Path:
    """A tokenizer.json for a folder that has none. Raises DataError when its files are no tokenizer."""
    source = next((folder / name for name in (SENTENCEPIECE, TIKTOKEN) if (folder / name).is_file()), None)
    if source is None or source.stat().st_size > MAX_BYTES:
        raise DataError(
            f"The model {folder.name!r} has no tokenizer.json.",
            f"Nor has it {SENTENCEPIECE} or {TIKTOKEN}, which one could be made from.",
        )
    data, names = source.read_bytes(), _named_ids(folder)
    key = hashlib.sha256(data + json.dumps([MADE_BY, source.name, sorted(names.items())]).encode()).hexdigest()
    made = models_root() / ".tokenizers" / f"{key}.json"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        make = from_sentencepiece if source.name == SENTENCEPIECE else from_tiktoken
        atomic_write_text(made, make(data, names).to_str())
    return made


def from_sentencepiece(data: bytes, names: dict[int, str] | None = None) -> Tokenizer:
    """The tokenizer in a sentencepiece file. `names` gives ids other names, as a tokenizer_config.json does.

    Raises DataError for a file that is none.
    """
    try:
        pieces, spec, normalizer = _model(data)
    except (IndexError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{SENTENCEPIECE} cannot be read: {error}.", "Fetch the model again.") from error
    renamed = [(names or {}).get(number, piece) for number, (piece, _, _) in enumerate(pieces)]
    unknown = next((number for number, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    if spec == BPE:
        vocabulary = {piece: number for number, piece in enumerate(renamed)}
        merges = _merges([(piece, score) for piece, score, kind in pieces if kind == NORMAL], vocabulary)
        tokenizer = Tokenizer(
            models.BPE(vocabulary, merges, unk_token=renamed[unknown], fuse_unk=True, byte_fallback=has_bytes)
        )
    else:
        scored = [(piece, score) for piece, (_, score, _) in zip(renamed, pieces, strict=True)]
        tokenizer = Tokenizer(models.Unigram(scored, unknown, has_bytes))
    _write_spaces_as_pieces(tokenizer, *normalizer)
    own = [(piece, kind) for piece, (_, _, kind) in zip(renamed, pieces, strict=True)]
    special = [
        piece for number, (piece, kind) in enumerate(own) if kind in (UNKNOWN, CONTROL) or number in (names or {})
    ]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    added = [piece for piece, kind in own if kind == USER_DEFINED and piece not in special]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in added])
    return tokenizer


def from_tiktoken(data: bytes, names: dict[int, str] | None = None) -> Tokenizer:
    """The tokenizer in a qwen.tiktoken: byte sequences by rank, then the control tokens. Raises DataError."""
    try:
        ranks = {
            base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, data.splitlines())
        }
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{TIKTOKEN} cannot be read: {error}.", "Fetch the model again.") from error
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (written[left], written[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
        for left, right in [_last_merge(token, ranks)]
    ]
    tokenizer = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in QWEN_SPECIAL])
    return tokenizer


def _write_spaces_as_pieces(tokenizer: Tokenizer, has_prefix: bool, charsmap: bytes) -> None:
    """As sentencepiece does: a space is a letter of its own, perhaps with one put before the text."""
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece joins them: the best score of what they become comes first."""
    found = []
    for piece, score in pieces:
        pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        found += [(-score, vocabulary[left], vocabulary[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(found)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is joined from last, when its bytes are joined by rank. Raises DataError."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right) for left, right in zip(parts, parts[1:], strict=False)]
        possible = [(rank, at) for at, rank in enumerate(joined) if rank is not None and rank < ranks[token]]
        if not possible:
            raise DataError(f"{TIKTOKEN} is damaged: the token {token!r} cannot be joined.", "Fetch the model again.")
        at = min(possible)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write each byte as (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _named_ids(folder: Path) -> dict[int, str]:
    """Names that tokenizer_config.json gives ids that are in the vocabulary already."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return {int(number): str(entry["content"]) for number, entry in config["added_tokens_decoder"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _model(data: bytes) -> tuple[list[tuple[str, float, int]], int, tuple[bool, bytes]]:
    """(pieces as (text, score, kind), kind of model, (is a space put before the text, table of characters))."""
    pieces, kind, has_prefix, charsmap = [], UNIGRAM, True, b""
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            pieces.append((fields[1].decode() if 1 in fields else "", score, fields.get(3, NORMAL)))
        elif number == 2:
            kind = dict(_fields(value)).get(3, UNIGRAM)
        elif number == 3:
            fields = dict(_fields(value))
            has_prefix, charsmap = bool(fields.get(3, 1)), fields.get(2, b"")
    if not pieces or kind not in (UNIGRAM, BPE):
        raise ValueError(f"it holds {len(pieces)} pieces of kind {kind}")
    return pieces, kind, (has_prefix, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: integers, and bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, -1), at)
            if size < 0 or at + size > len(data):
                raise ValueError("a field is cut short")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
