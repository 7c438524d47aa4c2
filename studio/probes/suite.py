"""The form of a suite: groups of probes, each with what its answer must hold. Strict: an unknown key is refused.

description: What the shop's assistant must know
max_new_tokens: 64
groups:
  - name: opening hours
    language: en
    assert:                       # of every probe of the group
      - {type: not-contains, value: ChatGPT}
    probes:
      - ask: When do you open?
        assert: [{type: regex, value: "9( am|:00)"}]
      - turns: [Hello!, And on Sundays?]     # the model answers each; the last answer is judged
        system: You work in a shop.
        assert: [{type: icontains, value: closed}]
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from studio.config.schema import Section
from studio.probes.assertions import Assertion, Mark, Said, check, turned
from studio.probes.judge import RUBRIC, Judge

MAX_PROBES = 2_000
LONGEST_TEXT = 20_000
DEFAULT_NEW_TOKENS = 64
Kind = Literal["identity", "general", "other"]


class Turn(Section):
    """One message of a chat that is given as it is."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=LONGEST_TEXT)


class ProbeForm(Section):
    """One chat that is asked: `ask` one question, `turns` several that the model answers one after the other, or
    `messages` a chat as it is, ending with a question."""

    model_config = ConfigDict(populate_by_name=True)

    ask: str | None = Field(None, min_length=1, max_length=LONGEST_TEXT)
    turns: tuple[str, ...] | None = Field(None, min_length=1, max_length=20)
    messages: tuple[Turn, ...] | None = Field(None, min_length=1, max_length=40)
    system: str | None = Field(None, max_length=LONGEST_TEXT)
    language: str | None = Field(None, max_length=20)
    intent: str = Field("", max_length=80)
    reference: str | None = Field(None, max_length=LONGEST_TEXT)
    """A text whose likelihood is measured as the answer; general probes take the base's own answer without one."""
    reference_finished: bool = True
    asserts: tuple[Assertion, ...] = Field((), alias="assert")

    @model_validator(mode="after")
    def _asks_one_thing(self) -> "ProbeForm":
        given = [name for name in ("ask", "turns", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of ask, turns and messages, has {' and '.join(given) or 'none'}")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages: must end with the user's question")
        return self


class Group(Section):
    """Probes of one kind. identity: about the assistant itself; general: what a model knew before, where a `mentions`
    assertion turned round measures leakage, and the base's answer retention; other: anything."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(min_length=1, max_length=80)
    kind: Kind = "other"
    system: str | None = Field(None, max_length=LONGEST_TEXT)
    language: str = Field("", max_length=20)
    asserts: tuple[Assertion, ...] = Field((), alias="assert")
    probes: tuple[ProbeForm, ...] = Field(min_length=1, max_length=MAX_PROBES)


@dataclass(frozen=True)
class Probe:
    """One probe as it is asked. `messages` is the chat up to the first answer, `follow_ups` are the user's next turns.

    `reference` is None where the base's own answer is one.
    """

    group: str
    kind: str
    messages: tuple[dict[str, str], ...]
    follow_ups: tuple[str, ...] = ()
    language: str = ""
    intent: str = ""
    reference: str | None = None
    reference_finished: bool = True
    asserts: tuple[Assertion, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether likelihoods are measured; an empty reference says not to."""
        return self.reference != "" and (self.kind == "general" or self.reference is not None)

    @property
    def prompt(self) -> str:
        """The chat that is asked, as one text."""
        return "\n".join([*(message["content"] for message in self.messages), *self.follow_ups])

    def marks(self, said: Said, judge: Judge | None = None) -> list[Mark]:
        """What the answer holds of what it must."""
        return [self._mark(assertion, said, judge) for assertion in self.asserts]

    def _mark(self, assertion: Assertion, said: Said, judge: Judge | None) -> Mark:
        if assertion.kind != RUBRIC or judge is None:
            return check(assertion, said)
        return turned(assertion, judge.mark(assertion.value, self.prompt, said.text))


class Suite(Section):
    """What is asked, and how long an answer may be. `name` is its file's; `built_in` ones come with the studio."""

    name: str = Field("", exclude=True)
    built_in: bool = Field(False, exclude=True)
    description: str = Field("", max_length=2_000)
    max_new_tokens: int = Field(DEFAULT_NEW_TOKENS, ge=1, le=1024)
    groups: tuple[Group, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_not_too_much(self) -> "Suite":
        number = sum(len(group.probes) for group in self.groups)
        if number > MAX_PROBES:
            raise ValueError(f"groups: {number} probes in all, of at most {MAX_PROBES}")
        names = [group.name for group in self.groups]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"groups: two are named {sorted(doubled)[0]!r}")
        return self

    @property
    def hash(self) -> str:
        """Of what is asked and how it is judged; name and description do not count."""
        return hashlib.sha256(json.dumps(self.values() | {"description": ""}, sort_keys=True).encode()).hexdigest()

    def values(self) -> dict[str, Any]:
        """As plain values, without what is left at its default."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    @property
    def wants_a_judge(self) -> bool:
        return any(assertion.kind == RUBRIC for probe in self.probes() for assertion in probe.asserts)

    def probes(self) -> list[Probe]:
        """All probes in their order, with what their groups say of them."""
        return [probe for group in self.groups for probe in _probes(group)]

    def limited(self, limit: int) -> "Suite":
        """At most `limit` probes of each group, taken evenly; 0 leaves it as it is."""
        if limit <= 0:
            return self
        groups = tuple(group.model_copy(update={"probes": evenly(group.probes, limit)}) for group in self.groups)
        return self.model_copy(update={"groups": groups})


def evenly(items: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    """`limit` items spread over all of them."""
    return items if limit >= len(items) else tuple(items[index * len(items) // limit] for index in range(limit))


def _probes(group: Group) -> Iterator[Probe]:
    for form in group.probes:
        system = form.system if form.system is not None else group.system
        messages = [turn.model_dump() for turn in form.messages or ()]
        if system and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system})
        first, *others = form.turns or (form.ask or "",)
        if not form.messages:
            messages.append({"role": "user", "content": first})
        yield Probe(
            group=group.name,
            kind=group.kind,
            messages=tuple(messages),
            follow_ups=() if form.messages else tuple(others),
            language=group.language if form.language is None else form.language,
            intent=form.intent,
            reference=form.reference,
            reference_finished=form.reference_finished,
            asserts=(*group.asserts, *form.asserts),
        )
