"""The model card (README.md) that goes with weights: what they are, what they were made from, how to use them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from studio.models import STARTER, resolve
from studio.paths import slugify
from studio.report import score_rows
from studio.store.evaluations import Evaluation

STARTER_HUB_ID, STARTER_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"

USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)"""
USE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)"""


def model_card(
    title: str,
    *,
    base: str,
    is_adapter: bool,
    facts: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    scorecard: Evaluation | None = None,
) -> str:
    """Markdown with a YAML header in the Hub's conventions; facts and scores become tables."""
    method = str(facts.get("method", ""))
    parts = [
        _header(base, "peft" if is_adapter else "transformers", method),
        f"# {_cell(title)}",
        _intro(base, is_adapter),
        _table(facts),
        *_scores(scorecard),
        f"## Use\n\n```python\n{USE_ADAPTER if is_adapter else USE_MODEL}\n```",
    ]
    if config:
        parts.append(f"## Config\n\n```json\n{json.dumps(config, ensure_ascii=False, indent=2)}\n```")
    return "\n\n".join(parts) + "\n"


def use_of(kind: str, folder_name: str, file: str) -> tuple[str, str]:
    """(title, how to use it) of an export."""
    if kind == "adapter":
        return f"{folder_name}, adapter", f"```python\n{USE_ADAPTER}\n```"
    if kind == "ollama":
        name = slugify(folder_name)
        return f"{folder_name} for Ollama", f"```bash\nollama create {name} -f Modelfile\nollama run {name}\n```"
    return f"{folder_name}, GGUF", f"```bash\nllama-cli -m {file} --jinja\nllama-server -m {file} --jinja\n```"


def export_card(title: str, base: str, facts: Mapping[str, Any], use: str, scorecard: Evaluation | None = None) -> str:
    """The card of files for another tool: what they are and what came of reading them back."""
    kind = str(facts["kind"])
    parts = [
        _header(base, "peft" if kind == "adapter" else "gguf", kind),
        f"# {_cell(title)}",
        _intro(base, kind == "adapter"),
        _table(facts),
        *_scores(scorecard),
        f"## Use\n\n{use}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(base: str, library: str, tag: str) -> str:
    """YAML in the Hub's conventions."""
    data = ModelCardData(
        base_model=STARTER_HUB_ID if base == STARTER else _hub_id(base),
        library_name=library,
        pipeline_tag="text-generation",
        license=STARTER_LICENSE if base == STARTER else None,
        tags=["retune", *filter(None, [tag])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _table(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items() if value not in ("", None, {})
    )
    return f"| | |\n| --- | --- |\n{rows}"


def _scores(scorecard: Evaluation | None) -> list[str]:
    """What the checkpoint scored beside its base, as a section; none for weights that were not scored."""
    if scorecard is None:
        return []
    table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in score_rows(scorecard))
    where = f"step {scorecard.step}" if scorecard.run_id else scorecard.subject
    told = (
        f"Measured on the checkpoint ({_cell(where)}, weights `{scorecard.weights_hash[:16]}`) on "
        f"{scorecard.created_at[:10]} with held-out probes, before it was written in this form. Brackets hold 95 % "
        "intervals."
    )
    return [f"## Scores\n\n{told}\n\n| Score | Base | Tuned |\n| --- | --- | --- |\n{table}"]


def _intro(base: str, is_adapter: bool) -> str:
    kind = "An adapter for" if is_adapter else "A model fine-tuned from"
    return f"{kind} `{_cell(shown_base(base))}`, made with Retune Studio."


def shown_base(base: str) -> str:
    """A base as a card names it: of a folder the last part, for where it lies on this machine is nobody's business."""
    return Path(base).name if resolve(base).kind == "folder" else base


def public_base(base: str) -> str:
    """What others find a base by: its id on the hub, or of a folder the last part."""
    return STARTER_HUB_ID if base == STARTER else shown_base(base)


def _hub_id(base: str) -> str | None:
    """Only ids belong in the header: a folder on this machine means nothing elsewhere."""
    return base if resolve(base).kind == "huggingface" else None


def _cell(value: Any) -> str:
    """A value as text of one line that cannot end its table cell or open HTML."""
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
