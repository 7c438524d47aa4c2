"""XTuner 0.1.23's dataset maps by name: from a row of a known dataset to XTuner's turns, with the same results.

A turn is {"system"?, "input"?, "output", "need_eos_token"?, "output_with_loss"?}. Where XTuner crashes, a row is bad;
where it crashes on a mere `loss` (missing, null or a boolean), the flag is read as XTuner's later versions do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from studio.data.conversation import list_of
from studio.data.msagent import react_turns
from studio.data.phrasings import load_bank
from studio.data.rows import BadRow, kind_of, shortened

Row = dict[str, Any]
Turns = list[dict[str, Any]]
IMAGE = "<image>"
NO_OUTPUT = "<nooutput>"
ALIASES = {
    "crime_kg_assitant": "crime_kg_assitan", "crime_kg_assistant": "crime_kg_assitan", "colorist": "colors",
    "arxiv_gentile": "arxiv", "law": "law_reference",
}  # fmt: skip


@dataclass(frozen=True)
class XTunerMap:
    """`columns` that a row must have; `convert` gives its turns, none where XTuner leaves the row out.

    `convert` raises BadRow.
    """

    columns: tuple[str, ...]
    convert: Callable[[Row], Turns]


def map_name(name: str) -> str:
    """The name as XTuner spells it."""
    return ALIASES.get(name, name)


@cache
def _systems() -> dict[str, str]:
    return dict(load_bank("templates")["systems"])


def _cell(row: Row, column: str) -> str:
    """A column's text; what is null counts as empty."""
    if column not in row:
        raise BadRow(f"it has no column {column!r}; its columns are {shortened(list(row))}.")
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    raise BadRow(f"column {column!r} must be text, not {kind_of(value)}.")


def _pair(question: str, answer: str, system: str = "") -> XTunerMap:
    """One turn: `question` names one column, or two with a + that are joined by a line break."""
    columns = question.split("+")

    def convert(row: Row) -> Turns:
        turn = {"system": _systems()[system]} if system else {}
        texts = [_cell(row, column) for column in columns]
        return [turn | {"input": "\n".join(texts), "output": _cell(row, answer)}]

    return XTunerMap((*columns, answer), convert)


def _alpaca(row: Row) -> Turns:
    """As XTuner on its columns; `history` and `system`, which XTuner does not know, are kept where a row has them."""
    if row.get("output") == NO_OUTPUT:
        return []
    last = {"input": f"{_cell(row, 'instruction')}\n{_cell(row, 'input')}", "output": _cell(row, "output")}
    turns: Turns = []
    for pair in list_of(row.get("history") or [], "history", allow_empty=True):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"a history entry must be a list of question and answer, not {shortened(pair)}.")
        turns.append({"input": pair[0], "output": pair[1]})
    turns.append(last)
    if system := row.get("system"):
        turns[0] = {"system": system} | turns[0]
    return turns


def _colors(row: Row) -> Turns:
    _name, _colon, description = _cell(row, "description").partition(":")
    return [{"system": _systems()["colorist"], "input": description.strip(), "output": _cell(row, "color")}]


def _openorca(row: Row) -> Turns:
    texts = {"system": "system_prompt", "input": "question", "output": "response"}
    return [{key: _cell(row, column) for key, column in texts.items()}]


def _pretrain(row: Row) -> Turns:
    return [{"input": "", "output": _cell(row, "text").strip(), "need_eos_token": False}]


def _oasst1(row: Row) -> Turns:
    """Everything between ### is a message when it begins with its speaker; a last question alone is left out."""
    texts = []
    for piece in _cell(row, "text").strip().split("###"):
        for speaker in ("Human:", "Assistant:"):
            if piece.strip().startswith(speaker):
                texts.append(piece.strip().removeprefix(speaker).strip())
    return [{"input": question, "output": answer} for question, answer in zip(texts[::2], texts[1::2], strict=False)]


def _openai(row: Row) -> Turns:
    turns: Turns = []
    system = question = ""
    for role, content, message in _spoken(row, "messages", "role", "content", skip="assistant"):
        if role == "system":
            system = content
        elif role == "user":
            question += content
        elif role == "assistant":
            trained = _flag(message.get("loss"))
            turns.append({"system": system, "input": question, "output": content, "output_with_loss": trained})
            system = question = ""
        else:
            raise BadRow(f"a message is from {role!r}; this map knows system, user and assistant.")
    return turns


def _flag(loss: object) -> bool:
    return True if loss is None else str(loss).lower() == "true"


def _wizardlm(row: Row) -> Turns:
    return _human_gpt(row, lambda text: text)


def _llava(row: Row) -> Turns:
    """`<image>` moves to the front of its question."""

    def with_image(text: str) -> str:
        return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text

    return _human_gpt(row, with_image)


def _llava_image_only(row: Row) -> Turns:
    def image_alone(text: str) -> str:
        if IMAGE not in text:
            raise BadRow(f"a question holds no {IMAGE}, and this map keeps nothing else of it.")
        return IMAGE

    return _human_gpt(row, image_alone)


def _human_gpt(row: Row, change: Callable[[str], str]) -> Turns:
    turns: Turns = []
    question = ""
    for speaker, text, _message in _spoken(row, "conversations", "from", "value", skip="gpt"):
        if speaker == "human":
            question += change(text)
        elif speaker == "gpt":
            turns.append({"input": question, "output": text})
            question = ""
        else:
            raise BadRow(f"a message is from {speaker!r}; this map knows human and gpt.")
    return turns


def _spoken(row: Row, column: str, who: str, what: str, skip: str) -> list[tuple[str, str, Row]]:
    """(speaker, text, message) without those of `skip` at the beginning."""
    found: list[tuple[str, str, Row]] = []
    for number, message in enumerate(list_of(row.get(column), column), start=1):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} must be an object with {who} and {what}, not {kind_of(message)}.")
        speaker = message.get(who)
        if not found and speaker == skip:
            continue
        if not isinstance(speaker, str) or not isinstance(message.get(what), str):
            raise BadRow(f'message {number} must have text under "{who}" and "{what}".')
        found.append((speaker, message[what], message))
    return found


def _moss_sft(row: Row) -> Turns:
    """MOSS-003: what stands between question and answer (thoughts, commands, tool results) belongs to the answer.

    Written by the prompt template moss_sft this is the dataset's own text. XTuner's loss also counts the questions,
    and leaves out the results of tools; here answers count as a whole, as in any conversation.
    """
    chat = row.get("chat")
    if not isinstance(chat, dict) or not chat:
        raise BadRow('"chat" must be an object with turns.')
    turns: Turns = []
    for key, turn in chat.items():
        if not isinstance(turn, dict):
            raise BadRow(f"{shortened(key)} must be an object, not {kind_of(turn)}.")
        question = _cell(turn, "Human").strip().removeprefix("<|Human|>:").removesuffix("<eoh>").strip()
        answer = "".join(_cell(turn, part) for part in turn if part != "Human")
        turns.append({"input": question, "output": answer})
    turns[0] = {"system": _cell(row, "meta_instruction")} | turns[0]
    return turns


XTUNER_MAPS: dict[str, XTunerMap] = {
    "alpaca": XTunerMap(("instruction", "input", "output"), _alpaca),
    "alpaca_zh": _pair("instruction_zh+input_zh", "output_zh"),
    "arxiv": _pair("abstract", "title", "arxiv_gentile"),
    "code_alpaca": _pair("prompt", "completion", "coder"),
    "colors": XTunerMap(("description", "color"), _colors),
    "crime_kg_assitan": _pair("input", "output", "lawyer"),
    "default": _pair("input", "output"),
    "law_reference": _pair("question", "answer", "lawyer"),
    "llava": XTunerMap(("conversations",), _llava),
    "llava_image_only": XTunerMap(("conversations",), _llava_image_only),
    "medical": _pair("instruction+input", "output", "medical"),
    "moss_sft": XTunerMap(("meta_instruction", "chat"), _moss_sft),
    "msagent_react": XTunerMap(("conversations",), react_turns),
    "oasst1": XTunerMap(("text",), _oasst1),
    "openai": XTunerMap(("messages",), _openai),
    "openorca": XTunerMap(("system_prompt", "question", "response"), _openorca),
    "pretrain": XTunerMap(("text",), _pretrain),
    "sql": _pair("context+question", "answer", "sql"),
    "stack_exchange": _pair("question", "response"),
    "tiny_codes": _pair("prompt", "response", "coder"),
    "wizardlm": XTunerMap(("conversations",), _wizardlm),
}


def _intel_orca_dpo(row: Row) -> Row:
    prompt = [("system", _cell(row, "system")), ("user", _cell(row, "question"))]
    return {
        "prompt": [{"role": role, "content": content} for role, content in prompt],
        "chosen": [{"role": "assistant", "content": _cell(row, "chosen")}],
        "rejected": [{"role": "assistant", "content": _cell(row, "rejected")}],
    }


def _orpo_dpo_mix_40k(row: Row) -> Row:
    chosen, rejected = (list_of(row.get(column), column) for column in ("chosen", "rejected"))
    if len(chosen) != len(rejected):
        raise BadRow(f"chosen has {len(chosen)} messages and rejected {len(rejected)}; both must have the same prompt.")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


# Row -> {"prompt", "chosen", "rejected"}, each a list of messages. Raise BadRow.
XTUNER_PREFERENCE_MAPS: dict[str, Callable[[Row], Row]] = {
    "intel_orca_dpo": _intel_orca_dpo,
    "orpo_dpo_mix_40k": _orpo_dpo_mix_40k,
}
PREFERENCE_COLUMNS: dict[str, tuple[str, ...]] = {
    "intel_orca_dpo": ("system", "question", "chosen", "rejected"),
    "orpo_dpo_mix_40k": ("chosen", "rejected"),
}
