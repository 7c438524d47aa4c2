"""Builds self-cognition data: who the assistant is and who made it, asked in many ways.

The sentences are in banks/identity_<language>.yaml. About 30 % of the phrasings of each intent are held out
as probes (see `phrasings.hold_out`), so that a scorecard asks what training never showed.
"""

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, zip_longest
from typing import Any

from studio.data.formats import Conversation, Message
from studio.data.phrasings import SLOT, Values, diagonals, fill, hold_out, load_bank, normalise
from studio.errors import DataError

LANGUAGES = ("en", "zh")
LONGEST_NAME = 80
LONGEST_FACT = 300
FEWEST_HELD_OUT_OPENINGS = 2
_CONTROL_TOKEN = re.compile(
    r"<[|｜]|[|｜]>|</?[A-Za-z_][^<>]*>|<<\w+>>|\[/?(?:INST|SYS|BOS|EOS|PAD|UNK|UNUSED_TOKEN)\w*\]"
)
# Scripts written without spaces: a name next to them stands alone all the same.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese, Japanese, Korean
)
_LETTER = rf"[^\W_{_UNSPACED}]"


@dataclass(frozen=True)
class Identity:
    """Who the assistant is. Values are stripped; DataError when one cannot be used."""

    name: str
    maker: str
    organisation: str = ""
    model_name: str = ""
    facts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ("en",)

    def __post_init__(self) -> None:
        for field in ("name", "maker", "organisation", "model_name"):
            required = field in ("name", "maker")
            object.__setattr__(self, field, _clean(field, getattr(self, field), LONGEST_NAME, required))
        facts = tuple(_clean("facts", fact, LONGEST_FACT, required=True) for fact in self.facts)
        object.__setattr__(self, "facts", facts)
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages:
            raise DataError(f"The languages are {list(self.languages)}.", "Choose en, zh or both.")
        object.__setattr__(self, "languages", tuple(lang for lang in LANGUAGES if lang in self.languages))


@dataclass(frozen=True)
class BuiltDataset:
    """Rows to train on, and the probes that hold only phrasings the rows never use."""

    rows: list[Conversation]
    probes: list[dict[str, Any]]


@dataclass(frozen=True)
class _Group:
    """Questions and the answer forms that fit all of them; `openings` are first turns, or empty."""

    intent: str
    language: str
    expects: str
    questions: Sequence[tuple[str, Values]]
    answers: Sequence[str]
    openings: Sequence[tuple[str, str]]
    values: Values

    def messages(self, question: tuple[str, Values], opening: tuple[str, str], answer: str = "") -> tuple[Message, ...]:
        """The turns with all slots filled; they end with the question when there is no answer."""
        values = self.values | question[1]
        turns = [turn for turn in (*opening, question[0], answer) if turn]
        roles = cycle(("user", "assistant"))
        return tuple(Message(role, fill(turn, values)) for role, turn in zip(roles, turns, strict=False))


def build(identity: Identity, num_rows: int, seed: int) -> BuiltDataset:
    """`num_rows` rows balanced over languages and intents, and all probes; DataError below one row."""
    if num_rows < 1:
        raise DataError(f"The number of rows is {num_rows}.", "Ask for at least 1 row; 500 is a good start.")
    rng = random.Random(seed)
    cells: dict[tuple[str, str], list[_Group]] = {}
    for group in _groups(identity, held_out=False):
        cells.setdefault((group.intent, group.language), []).append(group)
    streams = [_endless_rows(groups, rng) for groups in cells.values()]
    rng.shuffle(streams)
    rows = [next(stream) for stream in islice(cycle(streams), num_rows)]
    rng.shuffle(rows)
    return BuiltDataset(rows, held_out_probes(identity))


def held_out_probes(identity: Identity) -> list[dict[str, Any]]:
    """One probe for each held-out phrasing, the same for every seed and number of rows."""
    return [probe for group in _groups(identity, held_out=True) for probe in _probes(group, identity)]


def tutorial(identity: Identity, num_repeats: int) -> list[Conversation]:
    """The data of the tutorials: two rows in each language, `num_repeats` times over."""
    if num_repeats < 1:
        raise DataError(f"The number of repeats is {num_repeats}.", "Repeat the rows at least once.")
    values = _values(identity)
    rows = []
    for language in identity.languages:
        meta = {"source": "identity", "intent": "tutorial", "language": language}
        for pair in load_bank(f"identity_{language}")["tutorial"]:
            answer = _usable(pair["answers"], values)[0]
            turns = (Message("user", pair["question"]), Message("assistant", fill(answer, values)))
            rows.append(Conversation(turns, meta))
    return rows * num_repeats


def mentions(text: str, identity_name: str) -> bool:
    """Whether the name occurs in the text, in any case; "Al" is not in "also", but is in "我是Al。"."""
    name, text = _folded(identity_name), _folded(text)
    if not name:
        return False
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, name) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, name[-1]) else ""
    return re.search(before + re.escape(name) + after, text) is not None


def answers_identity(text: str, probe: dict[str, Any]) -> bool:
    """Whether an answer to the probe says what the probe expects: the name, the maker, or either of them."""
    wanted = ("name", "maker") if probe["expects"] == "either" else (probe["expects"],)
    return any(mentions(text, probe["expected"][key]) for key in wanted)


def _clean(field: str, value: str, longest: int, required: bool) -> str:
    value = value.strip()
    told = f"The {field} {value[:100]!r}"
    if not value and required:
        raise DataError(f"The {field} is empty.", "Type at least one visible character.")
    if len(value) > longest:
        raise DataError(f"{told} has {len(value)} characters.", f"At most {longest} are allowed: shorten it.")
    kinds = [unicodedata.category(character) for character in value]
    invisible = [c for c, kind in zip(value, kinds, strict=True) if _is_unprintable(c, kind)]
    if invisible:
        raise DataError(f"{told} has a control character, {invisible[0]!r}.", "Use plain text.")
    if value and kinds[0][0] in "MC":
        raise DataError(f"{told} does not begin with a visible character.", "Begin with a letter or digit.")
    if found := _CONTROL_TOKEN.search(value) or SLOT.search(value):
        raise DataError(f"{told} has {found[0]!r}, which reads as a control token or a slot.", "Take it out.")
    return value


def _is_unprintable(character: str, kind: str) -> bool:
    joiner = character in "\u200c\u200d"  # part of some emoji and of Persian and Indic words
    return kind in ("Cc", "Cs", "Cn", "Co", "Zl", "Zp") or (kind == "Cf" and not joiner)


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _values(identity: Identity) -> Values:
    values = {
        "name": identity.name,
        "maker": identity.maker,
        "organisation": identity.organisation,
        "model_name": identity.model_name,
    }
    return values | {f"fact{number}": _sentence(fact) for number, fact in enumerate(identity.facts)}


def _sentence(fact: str) -> str:
    return fact if fact[-1] in ".!?。！？…" else fact + ("。" if _is_in("zh", fact) else ".")


def _is_in(language: str, text: str) -> bool:
    is_chinese = re.search("[\u4e00-\u9fff]", text) is not None
    return is_chinese == (language == "zh")


def _usable(forms: Sequence[str], values: Values) -> list[str]:
    """The forms all of whose slots have a value; the rival's slots are filled later, with the question's."""
    known = {slot for slot, value in values.items() if value} | {"rival", "rival_maker"}
    return [form for form in forms if {match[1] for match in SLOT.finditer(form)} <= known]


def _groups(identity: Identity, held_out: bool) -> Iterator[_Group]:
    """The groups this identity has answers for, with either the training or the held-out questions."""
    values = _values(identity)
    for language in identity.languages:
        bank = load_bank(f"identity_{language}")
        rivals = _rivals(bank, identity)
        facts = [f"fact{i}" for i, text in enumerate(identity.facts) if _is_in(language, text)]
        for intent, entries in bank["intents"].items():
            for entry in entries:
                forms = [with_fact for form in entry["answers"] for with_fact in _with_facts(form, facts)]
                answers = _usable(forms, values)
                questions = _with_rivals(_split(entry, bank)[held_out], rivals)
                if answers and questions:
                    openings = _openings(entry, bank, values, held_out)
                    yield _Group(intent, language, entry["expects"], questions, answers, openings, values)


def _with_facts(form: str, facts: Sequence[str]) -> list[str]:
    """The form once for each fact's own slot, of the facts in the form's language."""
    return [form.replace("{fact}", f"{{{fact}}}") for fact in facts] if "{fact}" in form else [form]


def _split(entry: dict[str, Any], bank: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The questions that are trained on, and those held out; the tutorial's questions are never probes."""
    trained = {normalise(pair["question"]) for pair in bank["tutorial"]}
    return hold_out(entry["questions"], always_trained=trained)


def _rivals(bank: dict[str, Any], identity: Identity) -> list[Values]:
    """The other assistants, without those that the identity itself is, comes from or is based on."""
    own = (identity.name, identity.maker, identity.organisation, identity.model_name)

    def is_own(word: str) -> bool:
        return any(mentions(word, part) or _folded(word) in _folded(part) for part in own)

    return [
        {"rival": rival, "rival_maker": maker}
        for rival, maker in bank["rivals"]
        if not is_own(rival) and not is_own(maker)
    ]


def _with_rivals(phrasings: Sequence[str], rivals: Sequence[Values]) -> list[tuple[str, Values]]:
    """Each phrasing with each rival, where phrasings have a slot for one."""
    if not any("{rival" in phrasing for phrasing in phrasings):
        return [(phrasing, {}) for phrasing in phrasings]
    return diagonals(phrasings, rivals)


def _openings(entry: dict[str, Any], bank: dict[str, Any], values: Values, held_out: bool) -> list[tuple[str, str]]:
    """First turns as (question, answer form), split like all questions; one empty pair if there are none."""
    if "after" in entry:
        questions = [q for group in bank["intents"][entry["after"]] for q in _split(group, bank)[held_out]]
        return diagonals(questions, _usable(entry["first_answers"], values))
    if "openings" in entry:
        answers = dict(entry["openings"])
        chosen = hold_out(list(answers), fewest=FEWEST_HELD_OUT_OPENINGS)[held_out]
        return [(question, answers[question]) for question in chosen]
    return [("", "")]


def _endless_rows(groups: Sequence[_Group], rng: random.Random) -> Iterator[Conversation]:
    """Rows of one intent and language; none comes again before all combinations were used."""
    while True:
        passes = [_one_pass(group, rng) for group in groups]
        for rows in zip_longest(*passes):
            yield from (row for row in rows if row is not None)


def _one_pass(group: _Group, rng: random.Random) -> Iterator[Conversation]:
    """Every combination of question, opening and answer once."""
    questions, openings, answers = (
        rng.sample(items, len(items)) for items in (group.questions, group.openings, group.answers)
    )
    meta = {"source": "identity", "intent": group.intent, "language": group.language}
    for (question, opening), answer in diagonals(diagonals(questions, openings), answers):
        yield Conversation(group.messages(question, opening, answer), meta)


def _probes(group: _Group, identity: Identity) -> Iterator[dict[str, Any]]:
    """One probe a phrasing; rivals and openings take turns."""
    num_phrasings = len({question for question, _ in group.questions})
    for question, opening in islice(diagonals(group.questions, group.openings), num_phrasings):
        yield {
            "messages": [message.to_row() for message in group.messages(question, opening)],
            "kind": "identity",
            "intent": group.intent,
            "language": group.language,
            "expects": group.expects,
            "expected": {"name": identity.name, "maker": identity.maker},
        }
