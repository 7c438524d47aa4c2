"""One chat on its way through a chat template: which renderings tell where its trained parts lie."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from studio.data.render_worker import Chat
from studio.data.rendering import GENERATION_END, GENERATION_START
from studio.data.segments import ChatMessage, Segment, Span, Turn, as_turns, exceptions, mark_literals, split
from studio.errors import DataError

# Private-use characters around a message's content, to see where the template puts it.
CONTENT_START, CONTENT_END = "\U0010fff4", "\U0010fff5"
CONTENT = re.compile(f"{CONTENT_START}(.*?){CONTENT_END}", re.DOTALL)
GENERATION_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")


@dataclass
class Draft:
    """`wanted`: messages whose part must be found in `text`; `spans`: those found so far.

    `always`: what the template writes at the end of any chat.
    """

    turns: list[Turn] = field(default_factory=list)
    tools: Any = None
    wanted: list[int] = field(default_factory=list)
    text: str = ""
    spans: dict[int, Span] = field(default_factory=dict)
    error: DataError | None = None
    always: str = ""

    @classmethod
    def of(
        cls,
        messages: Sequence[ChatMessage],
        loss_on: str,
        control_tokens: Collection[str],
        tools: Any = None,
        always: str = "",
    ) -> "Draft":
        try:
            turns = mark_literals(as_turns(messages), control_tokens)
            return cls(turns, tools, exceptions(messages, loss_on), always=always)
        except DataError as error:
            return cls(error=error)

    @property
    def missing(self) -> list[int]:
        return [] if self.error else [index for index in self.wanted if index not in self.spans]

    def beginnings(self) -> Chat:
        """The whole chat, and for each answer what comes before it and what ends with it."""
        cuts = [(len(self.turns), False)]
        for index in self._answers(self.wanted):
            cuts += [(index, True), (index + 1, False)]
        return self.turns, list(dict.fromkeys(cuts)), self.tools

    def compare(self, texts: list[str]) -> None:
        """Find answers by what the text gains with them, or by the template's own generation tags."""
        by_cut = dict(zip(self.beginnings()[1], texts, strict=True))
        self.text = texts[0]
        if GENERATION_START in self.text:
            self._take_generated()
            return
        for index in self._answers(self.wanted):
            before, whole = by_cut[index, True], by_cut[index + 1, False]
            closed = whole.removesuffix(self.always)
            until = closed if closed.startswith(before) else whole
            if until.startswith(before) and self.text.startswith(until):
                self.spans[index] = (len(before), _answer_end(until, before, self.turns[index]["content"]))

    def framed(self, trimmed: bool) -> Chat:
        """The chat with marks around the missing messages' content, and its ends after each missing answer.

        `trimmed` puts the marks within the outer white space, for templates that take that away.
        """
        turns = [_frame(turn, trimmed) if index in self.missing else turn for index, turn in enumerate(self.turns)]
        cuts = [(len(turns), False)] + [(index + 1, False) for index in self._answers(self.missing)]
        return turns, cuts, self.tools

    def find_framed(self, texts: list[str]) -> None:
        """See where the marks landed, unless they changed anything else. An answer takes what ends its turn.

        Serves templates that write a turn differently once more turns follow, and overrides on messages that are
        not answers.
        """
        missing, pieces = self.missing, CONTENT.split(texts[0])
        if "".join(pieces) != self.text or len(pieces) != 2 * len(missing) + 1:
            return
        tails = [text.rpartition(CONTENT_END)[2].removesuffix(self.always).rstrip() for text in texts[1:]]
        endings = dict(zip(self._answers(missing), tails, strict=True))
        position = 0
        for index, before, content in zip(missing, pieces[::2], pieces[1::2], strict=False):
            start = position + len(before)
            position = start + len(content)
            self.spans[index] = (start, position + self._ending(endings.get(index, ""), position))

    def _ending(self, ending: str, position: int) -> int:
        """How much of an ending stands at `position`: all of it, or its first word where the last turn has more."""
        for wanted in (ending, ending.split(maxsplit=1)[0] if ending else ""):
            if self.text.startswith(wanted, position):
                return len(wanted)
        return 0

    def widen(self, lead: str, trail: str) -> None:
        """Take what stands directly around the answers with them, where it is exactly this."""
        for index in self._answers(list(self.spans)):
            start, end = self.spans[index]
            start -= len(lead) * self.text.endswith(lead, 0, start)
            self.spans[index] = (start, end + len(trail) * self.text.startswith(trail, end))

    def segments(self, trained: bool) -> list[Segment] | DataError:
        """The pieces; `trained` is the rule for text outside the spans."""
        if self.missing:
            self.error = DataError(
                f"The chat template rewrites message {self.missing[0] + 1}, so its part cannot be found.",
                'Use loss_on "all", or a template whose text for a turn does not depend on later turns.',
            )
        return self.error or split(self.text, (self.spans[index] for index in self.wanted), trained)

    def _answers(self, indices: list[int]) -> list[int]:
        return [index for index in indices if self.turns[index]["role"] == "assistant"]

    def _take_generated(self) -> None:
        """The spans that the template itself marks; there must be one for each assistant message."""
        pieces = GENERATION_MARKS.split(self.text)
        self.text = "".join(pieces)
        if not self.wanted:
            return
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        spans = [(starts[number], starts[number + 1]) for number in range(1, len(pieces), 2)]
        answers = self._answers(list(range(len(self.turns))))
        if len(spans) != len(answers):
            self.error = DataError(
                f"The chat template marks {len(spans)} generated parts for {len(answers)} assistant messages.",
                'Use loss_on "all", or correct the template\'s generation tags.',
            )
        self.spans = dict(zip(answers, spans, strict=False))
        if odd := [index for index in self.wanted if self.turns[index]["role"] != "assistant"]:
            self.error = DataError(
                f"Message {odd[0] + 1} is not an answer, and this chat template marks answers only.",
                "Leave out `trained` there.",
            )


def _frame(turn: Turn, trimmed: bool) -> Turn:
    content = turn["content"]
    start = len(content) - len(content.lstrip()) if trimmed else 0
    end = max(start, len(content.rstrip())) if trimmed else len(content)
    framed = f"{content[:start]}{CONTENT_START}{content[start:end]}{CONTENT_END}{content[end:]}"
    return turn | {"content": framed}


def _answer_end(until: str, prefix: str, content: str) -> int:
    """Where an answer and its end-of-turn token end; white space counts when nothing else ends the turn."""
    answer, content = until[len(prefix) :].rstrip(), content.rstrip()
    nothing_else = answer.endswith(content) if content else not answer
    return len(until) if nothing_else else len(prefix) + len(answer)
