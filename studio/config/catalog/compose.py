"""From the name of a built-in config to its settings: layers of terms, each of which says what it comes from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from studio.config.catalog.base_models import MODELS, KnownModel
from studio.config.catalog.grid import BY_MODEL, METHODS, OF_MODEL, Line, line_of, lines, recipe_of
from studio.config.catalog.recipes import RECIPES, system_text
from studio.config.schema import RunConfig, parse_config
from studio.config.xtuner.terms import PATHS, Converted, Terms, convert
from studio.errors import ConfigError, Problem

METHODS_HERE = {"int8_lora": "qlora"}  # of names that have another word for it
METHOD_TERMS: dict[str, dict[str, Any]] = {
    "qlora": {"learning_rate": 2e-4},
    "lora": {"learning_rate": 2e-4},
    "int8_lora": {"learning_rate": 2e-4},
    "full": {"learning_rate": 2e-5},
}
BOTS = {"baichuan": "Baichuan", "internlm": "InternLM", "llama2": "Llama2", "llama": "Llama", "qwen": "Qwen"}
STARTERS = ["starter_full", "starter_lora", "starter_qlora"]
ANY_MODEL = "any"  # the model of a name that leaves it open: qlora_alpaca_e3 with a base of one's own


@dataclass(frozen=True)
class Layer:
    """Terms, and what they come from."""

    reason: str
    terms: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A built-in config. `base` is the id of what it trains, `missing` what Retune cannot do of it yet, a
    sentence a line ("" for nothing), `notes` what is otherwise than in XTuner."""

    line: Line
    model: KnownModel
    base: str

    @property
    def name(self) -> str:
        return self.line.name

    @property
    def method(self) -> str:
        return METHODS_HERE.get(self.line.method, self.line.method)

    @property
    def missing(self) -> str:
        parts = [self.line.missing, RECIPES[self.line.recipe].missing]
        if "w1" in self.terms.targets:
            parts.append("Experts (w1, w2, w3) get no adapter: transformers keeps those of a layer in one weight.")
        split = self.terms.sequence_parallel
        if split > 1:
            parts.append(f"XTuner splits each sequence over {split} GPUs; here it must fit on one device.")
        return "\n".join(part for part in parts if part)

    @property
    def terms(self) -> Terms:
        return _terms(self)

    @property
    def slug(self) -> str:
        """The name as a config may have it: 64 lower-case characters at most."""
        return self.name.lower().replace("clip_vit_large_p14_336", "vit")[:64]


def built_in() -> dict[str, Entry]:
    """XTuner's configs by name, sorted."""
    return _built_in()


@cache
def _built_in() -> dict[str, Entry]:
    found = (Entry(line, MODELS[line.model], line.base or MODELS[line.model].hub_id) for line in lines())
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def find(name: str) -> Entry | None:
    """A built-in config, or one that the grammar makes of a known model, method and recipe; None for other names."""
    return built_in().get(name) or _composed(name)


def _composed(name: str) -> Entry | None:
    models = sorted((key for key in MODELS if name.startswith(f"{key}_")), key=len, reverse=True)
    for key in models:
        if line := _line(key, name.removeprefix(f"{key}_")):
            return Entry(line, MODELS[key], MODELS[key].hub_id)
    return None


def _line(model: str, rest: str) -> Line | None:
    """`qlora_alpaca_e3` for a model; None where that is no method, recipe and number of epochs."""
    method, _underscore, tag = rest.partition("_")
    recipe = recipe_of(tag)
    epochs = tag.removeprefix(f"{recipe}_")
    sound = method in METHODS and recipe and epochs[:1] == "e" and epochs[1:].isdigit() and 0 < int(epochs[1:]) <= 1000
    return line_of(model, method, tag) if sound and len(epochs) <= 5 else None


def on_base(name: str, base: str, template: str = "", known: KnownModel | None = None) -> Entry:
    """A built-in config, or `{method}_{recipe}_e{N}`, on a base model that is not in the table.

    `template` is the prompt template of its family ("": as its own tokenizer says) and counts for names that leave
    the model open; others keep theirs. Raises ConfigError.
    """
    entry = find(name)
    if entry:
        return replace(entry, base=base, model=known or entry.model)
    line = _line(ANY_MODEL, name)
    if line is None:
        raise unknown(name)
    shape = next(iter(MODELS.values())).shape
    model = known or KnownModel(ANY_MODEL, base, base, shape, template, 0)
    return Entry(replace(line, name=name), model, base)


def unknown(name: str) -> ConfigError:
    """The error for a name that no config has."""
    near = [each for each in built_in() if name and name.lower() in each][:5]
    near = near or get_close_matches(name.lower(), built_in(), n=3, cutoff=0.8) or STARTERS
    allowed = f"{', '.join(near)}; `retune list-cfg` lists all, {{model}}_{{method}}_{{recipe}}_e{{N}} makes more"
    return ConfigError([Problem("name", f"there is no built-in config {name!r}", allowed)], "catalog")


def converted(entry: Entry) -> Converted:
    """The values of an entry's RunConfig, and by path what each one comes from."""
    found = convert(entry.slug, entry.terms)
    reasons = {PATHS[term]: layer.reason for layer in _layers(entry) for term in layer.terms if term in PATHS}
    if entry.line.method == "full":
        reasons = {path: reason for path, reason in reasons.items() if not path.startswith("lora.")}
    remarks = {
        path: "; ".join(part for part in (reasons.get(path), found.remarks.get(path)) if part)
        for path in {**reasons, **found.remarks}
    }
    return Converted(found.values, remarks)


def config_of(entry: Entry) -> RunConfig:
    """The RunConfig of an entry."""
    return parse_config(converted(entry).values, entry.name)


def _terms(entry: Entry) -> Terms:
    values: dict[str, Any] = {}
    for layer in _layers(entry):
        values |= layer.terms
    return Terms(**values)


def _layers(entry: Entry) -> Iterator[Layer]:
    """What a config is made of, from the general to the particular; a later layer wins."""
    line, recipe = entry.line, RECIPES[entry.line.recipe]
    own = dict(line.terms)
    epochs = {"epochs": own.pop("epochs")} if f"_e{own.get('epochs')}" in line.name else {}
    yield Layer("", {"task": line.task, "base": entry.base, "method": entry.method})
    yield Layer(f"XTuner's {line.method}", METHOD_TERMS[line.method])
    yield Layer(f"of the model {line.model}", {"template": entry.model.template} | OF_MODEL.get(line.model, {}))
    yield Layer(f"of the data {line.recipe}", _of_recipe(entry) | recipe.terms)
    yield Layer(f"XTuner's {line.method} of {line.model}", BY_MODEL.get((line.model, line.method), {}))
    yield Layer("in the name", epochs)
    yield Layer("of this config", own)


def _of_recipe(entry: Entry) -> dict[str, Any]:
    recipe = RECIPES[entry.line.recipe]
    bot = BOTS.get(entry.line.model.partition("_")[0], "")
    return {
        "sources": recipe.sources, "epochs": recipe.epochs, "prompts": recipe.asked(),
        "system": system_text(recipe.system, bot),
    }  # fmt: skip
