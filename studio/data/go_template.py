"""A chat template as Ollama wants it: in Go's template language, found by looking at what the Jinja one writes.

Jinja templates are programs, and cannot be translated in general. But what most of them write around system message,
questions and answers is the same few texts each time. These are read off a few rendered chats, and held against others;
a template that does more than that is refused, and not approximated.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from studio.data.named import Template
from studio.errors import DataError

SYSTEM, QUESTION, ANSWER, NEXT = "Sy5temT3xt", "Qu3stionT3xt", "An5werT3xt", "N3xtT3xt"
TEXTS = ("opening", "answering", "later", "before_system", "after_system")
BRACES = '{{ "{{" }}'
"""Two braces that are text."""
TEXT = r'(?:(?!\{\{).|\{\{ "\{\{" \}\})*'
Chat = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class GoTemplate:
    """The texts around the parts of a chat.

    `opening` stands before a first question, `before_system` and `after_system` around a system message in its place;
    `answering` follows every question, and `later` stands between an answer and the next question.
    """

    opening: str
    answering: str
    later: str
    before_system: str = ""
    after_system: str = ""
    has_system: bool = False

    @property
    def source(self) -> str:
        """The template in Go: one line of actions, for they would write line breaks between them."""
        system = "{{ $system = .Content }}" if self.has_system else ""
        with_system = f"{{{{ else if $system }}}}{_go(self.before_system)}{{{{ $system }}}}{_go(self.after_system)}"
        first = f"{with_system if self.has_system else ''}{{{{ else }}}}{_go(self.opening)}"
        return (
            '{{ $later := false }}{{ $system := "" }}{{ range .Messages }}'
            f'{{{{ if eq .Role "system" }}}}{system}'
            f'{{{{ else if eq .Role "user" }}}}{{{{ if $later }}}}{_go(self.later)}{first}{{{{ end }}}}'
            f"{{{{ .Content }}}}{_go(self.answering)}{{{{ $later = true }}}}"
            '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
        )

    @classmethod
    def read(cls, source: str) -> "GoTemplate":
        """The template that has this source. Raises DataError for one that is not of this form."""
        for has_system in (True, False):
            marks = {name: f"\0{name}" for name in TEXTS}
            pattern = re.escape(cls(**marks, has_system=has_system).source)
            for name, mark in marks.items():
                pattern = pattern.replace(re.escape(mark), f"(?P<{name}>{TEXT})")
            if found := re.fullmatch(pattern, source, re.DOTALL):
                texts = {name: text.replace(BRACES, "{{") for name, text in found.groupdict().items()}
                return cls(**texts, has_system=has_system)
        raise DataError("The Go template is not one of ours.", "Export it again.")

    def render(self, messages: Chat) -> str:
        """What the template writes, by the same rules as its Go source."""
        text, system, later = "", "", False
        for message in messages:
            if message["role"] == "system" and self.has_system:
                system = message["content"]
            elif message["role"] == "user":
                first = f"{self.before_system}{system}{self.after_system}" if system else self.opening
                text += (self.later if later else first) + message["content"] + self.answering
                later = True
            elif message["role"] == "assistant":
                text += message["content"]
        return text

    def without_bos(self, token: str) -> "GoTemplate":
        """For tools that put the first token there themselves."""
        if not token:
            return self
        return replace(
            self, opening=self.opening.removeprefix(token), before_system=self.before_system.removeprefix(token)
        )


def go_template(template: Template) -> GoTemplate:
    """Raises DataError for a template that writes more than a few texts around the parts of a chat."""
    opening, answering = _cut(template, [_user(QUESTION)], QUESTION)
    _, between, _ = _cut(template, [_user(QUESTION), _assistant(ANSWER), _user(NEXT)], QUESTION, NEXT)
    later = between.partition(ANSWER)[2]
    found = GoTemplate(opening, answering, later)
    if has_system(template):
        before, after, _ = _cut(template, [_system(SYSTEM), _user(QUESTION)], SYSTEM, QUESTION)
        found = replace(found, before_system=before, after_system=after, has_system=True)
    for chat in _chats(found.has_system):
        if found.render(chat) != template.render(chat, add_generation_prompt=True):
            raise _refused(f"it writes a chat of {len(chat)} messages otherwise than by fixed texts around them")
    return found


def has_system(template: Template) -> bool:
    """Whether the template has a place for a system message."""
    try:
        return SYSTEM in template.render([_system(SYSTEM), _user(QUESTION)], add_generation_prompt=True)
    except DataError:
        return False


def _chats(with_system: bool) -> list[Chat]:
    """Other chats than those that the texts were read off, for the check."""
    chat = [
        _user("Who are you?\n你是谁？"),
        _assistant("Luna."),
        _user("3 < 4 & 5"),
        _assistant("- a\n- b"),
        _user("Ok"),
    ]
    system = [_system("Be brief.\n简短。")] if with_system else []
    return [[*before, *chat[:length]] for before in ([], system) for length in (1, 3, 5)]


def _cut(template: Template, chat: Chat, *marks: str) -> list[str]:
    """What a rendered chat has before, between and after the marks."""
    pieces, rest = [], template.render(chat, add_generation_prompt=True)
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise _refused("it changes what a message says")
        pieces.append(before)
    return [*pieces, rest]


def _go(text: str) -> str:
    return text.replace("{{", BRACES)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _refused(reason: str) -> DataError:
    return DataError(
        f"This chat template cannot be written for Ollama: {reason}.",
        "Export GGUF alone: llama.cpp and LM Studio read the template in the file as it is.",
    )
