"""The named prompt templates (banks/templates.yaml), written and tokenised by XTuner 0.1.23's rule.

Each turn is a question and an answer, encoded apart: BOS, system and question, then answer and suffix, EOS, separator.
A template whose suffix ends the turn has one BOS and no EOS; the others have both in every turn, as XTuner does.
Unlike XTuner, text of a message that looks like a control token stays text.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from studio.data.conversation import Conversation
from studio.data.phrasings import load_bank
from studio.data.segments import (
    ChatMessage,
    Segment,
    as_turns,
    exceptions,
    mark_literals,
    require_loss_on,
    split,
)
from studio.data.template import ChatTemplate, read_json, special_tokens
from studio.errors import DataError

NO_TEMPLATE = "none"
QWEN_TOKENIZERS = ("QWenTokenizer", "QWen2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
JINJA = """
{%- set ns = namespace(round=1, begin=true, systems='', inputs='', open=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- (t['bos'] if ns.begin else '') + ns.systems + t['before'] | replace('{round}', ns.round | string) -}}
        {{- ns.inputs + t['after'] + message['content'] + t['ending'] -}}
        {%- set ns.round = ns.round + 1 -%}{%- set ns.begin = t['again'] -%}
        {%- set ns.systems = '' -%}{%- set ns.inputs = '' -%}{%- set ns.open = false -%}
    {%- elif message['role'] == 'user' -%}
        {%- set ns.inputs = ns.inputs + message['content'] -%}{%- set ns.open = true -%}
    {%- elif message['role'] == 'system' -%}
        {%- if message['content'] and t['refuse'] -%}
            {{- raise_exception('This template has no place for a system message.') -}}
        {%- elif message['content'] and t['has_system'] -%}
            {%- set ns.systems = ns.systems + t['system_before'] + message['content'] + t['system_after'] -%}
        {%- endif -%}
        {%- set ns.open = true -%}
    {%- else -%}
        {{- raise_exception('Allowed roles: system, user, assistant.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if ns.open -%}
    {{- (t['bos'] if ns.begin else '') + ns.systems + t['before'] | replace('{round}', ns.round | string) -}}
    {{- ns.inputs + t['after'] -}}
{%- endif -%}
"""
CHATGLM_BOS = ("[gMASK]sop", (64790, 64792))


@dataclass(frozen=True)
class NamedTemplate:
    """The strings of a named template (see the yaml for their meaning) and the tokens around its turns.

    `bos`: text, and ids where the text does not tell them; empty when the tokenizer begins without one.
    Only minicpm has no place for a system message: a row with one is refused rather than losing it in silence.
    The template "none" writes questions and answers as they are, with EOS after each answer, and leaves system
    messages out; it alone honours a turn's own `need_eos_token` and `sep`.
    """

    name: str
    user: str = "{input}"
    system: str = ""
    suffix: str = ""
    suffix_ends: bool = False
    separator: str = ""
    stop: tuple[str, ...] = ()
    without_system: bool = False
    bos: tuple[str, tuple[int, ...]] = ("", ())
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, model_folder: Path) -> "NamedTemplate":
        """The template of that name with the tokens of a model folder; DataError for a name there is not."""
        if name not in template_names():
            raise DataError(f"There is no template named {name!r}.", f"Allowed: {', '.join(template_names())}.")
        fields = dict(load_bank("templates")["prompts"].get(name, {}))
        stop, tokens = tuple(fields.pop("stop", ())), special_tokens(Path(model_folder))
        bos = _bos(Path(model_folder), tokens)
        if bos[0] and str(fields.get("user", "")).startswith(bos[0]):
            bos = ("", ())  # each turn begins with it already (SmolLM2's BOS is <|im_start|>); XTuner writes it twice
        return cls(name, **fields, stop=stop, bos=bos, special_tokens=tokens)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that shapes the text."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode("utf-8")).hexdigest()

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
        """The text of a chat. After a last question the answer's opening stands in any case: it is the question's."""
        return "".join(segment.text for segment in self.segments(messages))

    def segments(
        self,
        messages: Sequence[ChatMessage],
        loss_on: str = "assistant",
        control_tokens: Collection[str] = (),
        turn_ends: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """As ChatTemplate.segments. `turn_ends`: for "none", `need_eos_token` and `sep` of each turn.

        Raises DataError for roles other than system, user and assistant, for a system message where the template
        has no place for it, and when a turn needs the tokenizer's EOS and it has none.
        """
        require_loss_on(loss_on)
        turns = mark_literals(as_turns(messages), control_tokens)
        counts = [(index in exceptions(messages, loss_on)) != (loss_on == "all") for index in range(len(turns))]
        writer = _Writer(self, loss_on == "all")
        for number, (questions, answer) in enumerate(_turns(turns), start=1):
            ends = turn_ends[number - 1] if self.name == NO_TEMPLATE and number <= len(turn_ends) else {}
            writer.question([(turns[index], counts[index]) for index in questions], number)
            if answer is not None:
                writer.answer(turns[answer]["content"], counts[answer], ends)
        return writer.segments

    def segments_of(
        self, conversations: Sequence[Conversation], loss_on: str = "assistant", control_tokens: Collection[str] = ()
    ) -> list[list[Segment] | DataError]:
        """As ChatTemplate.segments_of. A conversation's meta "turns" has the `turn_ends`."""
        require_loss_on(loss_on)
        return [self._segments_or_error(conversation, loss_on, control_tokens) for conversation in conversations]

    def _segments_or_error(
        self, conversation: Conversation, loss_on: str, control_tokens: Collection[str]
    ) -> list[Segment] | DataError:
        try:
            turn_ends = conversation.meta.get("turns", ())
            return self.segments(conversation.messages, loss_on, control_tokens, turn_ends)
        except DataError as error:
            return error


Template = ChatTemplate | NamedTemplate


def template_names() -> list[str]:
    """All named templates, "none" at the end."""
    return [*load_bank("templates")["prompts"], NO_TEMPLATE]


def load_template(name: str, model_folder: Path) -> Template:
    """The template of that name for a model; "" is the tokenizer's own. Raises DataError when there is none."""
    return NamedTemplate.load(name, model_folder) if name else ChatTemplate.load(model_folder)


def writes_date(template: Template) -> bool:
    """Whether a template writes the day's date, so that the same chat is another text tomorrow."""
    return "strftime_now" in getattr(template, "source", "")


def as_jinja(template: NamedTemplate) -> str:
    """The template in Jinja, for whatever reads a model folder: the same text as `render` writes."""
    before, after = template.user.split("{input}")
    system_before, _, system_after = template.system.partition("{system}")
    eos = "" if template.suffix_ends else template.special_tokens.get("eos_token", "")
    parts = {
        "bos": template.bos[0], "again": not template.suffix_ends, "before": before, "after": after,
        "has_system": bool(template.system), "system_before": system_before, "system_after": system_after,
        "refuse": template.without_system, "ending": template.suffix + eos + template.separator,
    }  # fmt: skip
    return f"{{%- set t = {json.dumps(parts, ensure_ascii=False)} -%}}" + JINJA


class _Writer:
    """Writes turn after turn; every call of `_part` is encoded apart from what stands before."""

    def __init__(self, template: NamedTemplate, everything: bool) -> None:
        self.segments: list[Segment] = []
        self._template = template
        self._everything = everything
        self._begin = True
        self._parts = 0

    def question(self, messages: list[tuple[dict[str, Any], bool]], number: int) -> None:
        """BOS where it is due, then system and question in the template's words."""
        template, pieces = self._template, []
        text, ids = template.bos
        if self._begin and text:
            self._part([(text, self._everything)], ids)
        for system, trained in ((turn["content"], counts) for turn, counts in messages if turn["role"] == "system"):
            pieces += self._filled(self._system(system), "{system}", system, trained)
        inputs = [(turn["content"], trained) for turn, trained in messages if turn["role"] == "user"] or [("", False)]
        before, after = template.user.replace("{round}", str(number)).split("{input}")
        self._part([*pieces, (before, self._everything), *inputs, (after, self._everything)])

    def answer(self, text: str, trained: bool, ends: Mapping[str, Any]) -> None:
        """The answer and its suffix, EOS unless the suffix ends the turn, and the separator."""
        template = self._template
        self._part([(text + template.suffix, trained)])
        self._begin = not template.suffix_ends and ends.get("need_eos_token") is not False
        if self._begin:
            self._part([(self._eos(), trained)])
        self._part([(ends.get("sep") or template.separator, self._everything)])

    def _part(self, pieces: list[tuple[str, bool]], ids: tuple[int, ...] = ()) -> None:
        self._parts += 1
        text = "".join(piece for piece, _ in pieces)
        position, spans = 0, []
        for piece, trained in pieces:
            if trained:
                spans.append((position, position + len(piece)))
            position += len(piece)
        self.segments += [
            Segment(each.text, each.trained, each.literal, self._parts, ids) for each in split(text, spans, False)
        ]

    def _system(self, text: str) -> str:
        template = self._template
        if template.without_system and text:
            raise DataError(
                f"The template {template.name!r} has no place for a system message, and the row has one.",
                "Take the system message out, or choose another template.",
            )
        return template.system if text else ""

    def _filled(self, template: str, slot: str, text: str, trained: bool) -> list[tuple[str, bool]]:
        if slot not in template:
            return []
        before, after = template.split(slot)
        return [(before, self._everything), (text, trained), (after, self._everything)]

    def _eos(self) -> str:
        eos = self._template.special_tokens.get("eos_token", "")
        if not eos:
            raise DataError(
                f"The template {self._template.name!r} ends turns with the tokenizer's EOS, and it names none.",
                'Add "eos_token" to the model\'s tokenizer_config.json.',
            )
        return eos


def _turns(messages: list[dict[str, Any]]) -> Iterator[tuple[list[int], int | None]]:
    """Indices of a turn's system and user messages, and of its answer; None while there is none yet."""
    questions: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield questions, index
            questions = []
        elif message["role"] in ("system", "user"):
            questions.append(index)
        else:
            raise DataError(
                f"Message {index + 1} has the role {message['role']!r}, which named templates cannot write.",
                "Allowed: system, user, assistant.",
            )
    if questions:
        yield questions, None


def _bos(folder: Path, tokens: dict[str, str]) -> tuple[str, tuple[int, ...]]:
    """What XTuner begins a text with, by the class of the tokenizer."""
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if kind == "ChatGLMTokenizer":
        return CHATGLM_BOS
    return ("", ()) if kind in QWEN_TOKENIZERS else (tokens.get("bos_token", ""), ())
