"""Built-in configs by name: presets for the starter model, a YAML file each, and XTuner's, composed from tables.

The tables are base_models.py, recipes.py and grid.py; compose.py puts them together.
"""

from importlib import resources

from studio.config.catalog.base_models import BY_ID
from studio.config.catalog.compose import Entry, built_in, converted, find, on_base, unknown
from studio.config.catalog.deepspeed import DEEPSPEED_NAMES, deepspeed_preset
from studio.config.catalog.families import family_of
from studio.config.catalog.recipes import RECIPES
from studio.config.schema import RunConfig
from studio.config.yaml import commented_text, load_text, update_text, with_settings
from studio.errors import ConfigError, Problem

__all__ = [
    "DEEPSPEED_NAMES",
    "Entry",
    "built_in",
    "copy_text",
    "deepspeed_preset",
    "entry",
    "entry_text",
    "is_built_in",
    "listed",
    "on_base",
    "preset",
    "preset_names",
    "preset_text",
]


def preset_names() -> list[str]:
    """Those for the starter model, which come as files."""
    return sorted(
        file.name.removesuffix(".yaml") for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml")
    )


def listed(pattern: str = "") -> list[str]:
    """All names that XTuner lists too, DeepSpeed's presets among them, and our own presets; those that hold `pattern`,
    whatever its case."""
    names = [*built_in(), *DEEPSPEED_NAMES, *preset_names()]
    return sorted(name for name in names if pattern.lower() in name.lower())


def is_built_in(name: str) -> bool:
    """Whether there is a config of this name: a preset, one of XTuner's, or one that the grammar composes."""
    return name in preset_names() or find(name) is not None


def entry(name: str) -> Entry:
    """One of XTuner's configs, or one that the grammar composes. Raises ConfigError."""
    found = find(name)
    if found is None:
        raise unknown(name)
    return found


def preset_text(name: str) -> str:
    """The YAML of a built-in config, with its comments. Raises ConfigError naming those there are."""
    if name in preset_names():
        return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    if found := find(name):
        return entry_text(found)
    if name in DEEPSPEED_NAMES:
        raise ConfigError([Problem("preset", f"{name} sets DeepSpeed and is no config of a run")], "catalog")
    raise unknown(name)


def copy_text(name: str, base: str = "") -> str:
    """The YAML of a built-in config, on another base model where one is given. A name that leaves the model open
    (`qlora_alpaca_e3`) takes the prompt template of its family, as its config.json says; one that names a model keeps
    that model's, unless the base is another of the table. Raises ConfigError, ModelError."""
    if not base:
        return preset_text(name)
    if name in preset_names():
        return update_text(preset_text(name), with_settings(preset(name), [f"model.base={base}"]))
    return entry_text(on_base(name, base, *family_of(base)))


def preset(name: str) -> RunConfig:
    return load_text(preset_text(name), name)


def entry_text(found: Entry) -> str:
    """The YAML of an entry; behind each value what it comes from."""
    values = converted(found)
    return commented_text(values.values, values.remarks, _header(found))


def _header(found: Entry) -> list[str]:
    model, recipe = found.model, RECIPES[found.line.recipe]
    origin = built_in().get(found.name)
    made = "as in XTuner 0.1.23" if origin else "composed in the grammar of XTuner"
    on_other = ", on another base model" if origin and origin.base != found.base else ""
    lines = [f"{found.name}: {made}{on_other}."]
    if found.base in BY_ID:
        lines.append(f"Model: {found.base}, {model.shape.billions:.1f} billion weights.")
        lines.append(f"From ModelScope instead: model.base: modelscope:{model.modelscope_id}")
    lines.append(f"Data: {recipe.about}. `retune data fetch` with this file gets what the project does not have yet.")
    if found.missing:
        lines += [f"NOT IN RETUNE YET: {each}" for each in found.missing.splitlines()]
    lines += [f"Otherwise: {note}." for note in found.line.notes]
    return [*lines, "Behind a value stands what it comes from."]
