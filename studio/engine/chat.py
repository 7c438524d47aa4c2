"""From messages to token ids and back, for whatever talks to a loaded model."""

from collections.abc import Sequence

from studio.data.segments import ChatMessage, as_turns, mark_literals, split
from studio.data.tokens import encode_prompt
from studio.engine.models.load import LoadedModel

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what stands for a part of a character
FEW_TOKENS = 36  # the newest of an answer, which those that follow are decoded with; characters of 2, 3, 4 bytes fit in


def prompt_ids(loaded: LoadedModel, messages: Sequence[ChatMessage]) -> list[int]:
    """Ids of a chat up to where the assistant answers, or goes on when the last message is the assistant's.

    Control tokens inside a message stay ordinary text. Raises DataError when the template refuses the messages.
    """
    *before, last = as_turns(messages)
    if last["role"] != "assistant" or not before:
        return encode_prompt(messages, loaded.template, loaded.tokenizer)
    begun = split(mark_literals([last], loaded.tokenizer.control_tokens)[0]["content"], (), False)
    return encode_prompt(before, loaded.template, loaded.tokenizer) + loaded.tokenizer.encode_segments(begun)[0]


def context_limit(loaded: LoadedModel) -> int:
    """The longest text in tokens that the model has positions for."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 4096


def before_stop(text: str, stops: Sequence[str]) -> str:
    """What stands before the first stop text; all of it when there is none."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


class TextStream:
    """Turns the tokens of one answer into pieces of text: whole characters only, ending before a stop text."""

    def __init__(self, loaded: LoadedModel, stops: Sequence[str] = ()) -> None:
        self._tokenizer = loaded.tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._before, self._overlap = "", 0
        self._sent = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now; "" while a character or a possible stop text is incomplete."""
        self._ids.append(token)
        if len(self._ids) > 2 * FEW_TOKENS:
            self._forget_old()
        return self._send(self._before_stop(self._text().rstrip(BROKEN), hold_back=True))

    def finish(self) -> str:
        """What was held back."""
        return self._send(self._before_stop(self._text(), hold_back=False))

    @property
    def text(self) -> str:
        """All that was given out."""
        return self._sent

    def _text(self) -> str:
        """All of the answer."""
        return self._before + self._decode(self._ids)[self._overlap :]

    def _forget_old(self) -> None:
        """Keep the text of old tokens in their place: to decode all of them for each new one takes longer and longer.

        The newest stay, as what follows may depend on them, and only where they begin and end with whole characters.
        """
        newest = self._ids[-FEW_TOKENS:]
        text = self._decode(newest)
        if BROKEN not in text:
            self._before, self._overlap, self._ids = self._text(), len(text), newest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):  # a decoder that changes what it said: wait for more
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def _before_stop(self, text: str, hold_back: bool) -> str:
        before = before_stop(text, self._stops)
        self.stopped = self.stopped or before != text
        return text[: len(text) - self._possible_stop(text)] if hold_back and not self.stopped else before

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)
