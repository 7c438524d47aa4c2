"""How weights want to be spoken to, as their folder says: the template they were trained with, and what ends it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.data.phrasings import load_bank
from studio.data.template import read_json

WEIGHTS_FILE, GATE_FILE = "retune_weights.json", "gate.json"
XTUNER_CONFIG = "xtuner_config.py"  # XTuner puts the run's config beside what it converts
XTUNER_TEMPLATE = re.compile(r"PROMPT_TEMPLATE\.(\w+)")
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Talk:
    """`template`: a named one, empty for the tokenizer's own. `stops`: texts at which an answer ends."""

    template: str = ""
    stops: tuple[str, ...] = ()

    def to_row(self) -> dict[str, Any]:
        return {"template": self.template, "stops": list(self.stops)}


def mismatch(folder: Path, asked: str) -> str:
    """Why the named template `asked` will not do for the weights in a folder; empty when it will, or nobody knows."""
    talk = read_talk(folder)
    if not asked or talk is None or talk.template == asked:
        return ""
    trained = f"the template {talk.template}" if talk.template else "its tokenizer's own template"
    return f"{folder.name} was trained with {trained} and is asked with {asked}: expect worse or endless answers."


def talk_of(template: str) -> Talk:
    """What to write beside weights that were trained with this template; "" is the tokenizer's own."""
    return Talk(template, tuple(load_bank("templates")["prompts"].get(template, {}).get("stop", ())))


def read_talk(folder: Path) -> Talk | None:
    """What a folder of weights says of it, ours or XTuner's; None when it says nothing."""
    row = read_json(folder / WEIGHTS_FILE).get("talk")
    if isinstance(row, dict):
        stops = row.get("stops")
        texts = tuple(str(each) for each in stops) if isinstance(stops, list) else ()
        return Talk(str(row.get("template") or ""), texts)
    config = folder / XTUNER_CONFIG
    if not config.is_file() or config.stat().st_size > MAX_CONFIG_BYTES:
        return None
    found = XTUNER_TEMPLATE.search(config.read_text(encoding="utf-8", errors="replace"))
    return talk_of(found[1]) if found and found[1] in load_bank("templates")["prompts"] else None
