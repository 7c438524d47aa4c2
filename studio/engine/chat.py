"""From messages to token ids and back, for whatever talks to a loaded model."""

from collections.abc import Sequence

from studio.data.segments import ChatMessage, as_turns, mark_literals, split
from studio.data.tokens import encode_prompt
from studio.engine.models.load import LoadedModel


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


class TextStream:
    """Turns the tokens of one answer into pieces of text: whole characters only, ending before a stop text."""

    def __init__(self, loaded: LoadedModel, stops: Sequence[str] = ()) -> None:
        self._tokenizer = loaded.tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now; "" while a character or a possible stop text is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if len(self._ids) else text
        return self._send(self._before_stop(whole, hold_back=True))

    def finish(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._send(self._before_stop(text, hold_back=False))

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):  # a decoder that changes what it said: wait for more
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def _before_stop(self, text: str, hold_back: bool) -> str:
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        return text[: len(text) - self._possible_stop(text)] if hold_back else text

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)
