"""The config being edited: values and YAML text of one object, kept for the session. Draws nothing."""

from dataclasses import dataclass, replace
from typing import Any

from studio import runs
from studio.config.catalog import is_built_in, preset, preset_names
from studio.config.schema import RunConfig, parse_config
from studio.config.yaml import load_text, read_text, update_text
from studio.errors import ConfigError, DataError, Problem
from studio.paths import atomic_write_text
from studio.projects import Project
from studio.ui import state

KEY = "config.draft"
OWN, PRESET = "own", "preset"
DEFAULT_PRESET = "starter_lora"


@dataclass(frozen=True)
class Draft:
    """`source` is own:NAME or preset:NAME; `text` is the last YAML, `values` the last form, `problems` the newer one's.

    `version` names the widgets of the form, so that they start over when the text was changed elsewhere.
    """

    source: str
    text: str
    values: dict[str, Any]
    problems: tuple[Problem, ...] = ()
    version: int = 0
    saved_text: str = ""
    text_is_newer: bool = False

    @property
    def config(self) -> RunConfig | None:
        """The config, when nothing is wrong with it."""
        return None if self.problems else parse_config(self.values)

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self.text != self.saved_text


def sources(project: Project) -> list[str]:
    """What can be opened: the project's own configs, then the presets."""
    own = [f"{OWN}:{name}" for name in runs.list_configs(project)]
    return own + [f"{PRESET}:{name}" for name in preset_names()]


def current(project: Project) -> Draft:
    """The draft of the session; at first the project's first config, else the default preset."""
    draft = state.kept(KEY)
    if draft is None:
        there = sources(project)
        first = there[0] if there[0].startswith(OWN) else f"{PRESET}:{DEFAULT_PRESET}"
        draft = opened(project, first)
    return draft


def opened(project: Project, source: str) -> Draft:
    """Open a config or preset in place of the draft. What is wrong in a file is shown, not raised."""
    kind, _colon, name = source.partition(":")
    text = runs.preset_text(project, name) if kind == PRESET else read_text(runs.config_path(project, name))
    return remember(_with_text(_begun(source, text, text), text))


def taken(name: str, text: str) -> Draft:
    """Put a config from elsewhere in place of the draft; it is not saved yet."""
    return remember(_with_text(_begun(f"{OWN}:{name}", text), text))


def _begun(source: str, text: str, saved_text: str = "") -> Draft:
    """A draft whose widgets start over."""
    before = state.kept(KEY)
    version = before.version + 1 if before else 1
    return Draft(source, text, preset(DEFAULT_PRESET).model_dump(mode="json"), (), version, saved_text)


def remember(draft: Draft) -> Draft:
    state.keep(KEY, draft)
    return draft


def edited_text(draft: Draft, text: str) -> Draft:
    """The draft after its YAML was edited; the form follows."""
    return remember(_with_text(replace(draft, version=draft.version + 1), text))


def edited_form(draft: Draft, values: dict[str, Any]) -> Draft:
    """The draft after its form was edited; the YAML follows, with its comments, once the values are sound."""
    if values == draft.values:
        return draft
    try:
        config = parse_config(values)
    except ConfigError as error:
        return remember(replace(draft, values=values, problems=tuple(error.problems), text_is_newer=False))
    text = draft.text if _same(draft.text, config) else update_text(draft.text, config)
    return remember(replace(draft, values=values, text=text, problems=()))


def save(project: Project, draft: Draft) -> Draft:
    """Write the draft as configs/NAME.yaml under the name it bears. Raises ConfigError while something is wrong."""
    config = load_text(draft.text)
    atomic_write_text(runs.config_path(project, config.name), draft.text)
    return remember(replace(draft, source=f"{OWN}:{config.name}", saved_text=draft.text))


def renamed(draft: Draft, name: str) -> Draft:
    """The draft under another name. Raises ConfigError when it cannot be one."""
    config = parse_config({**load_text(draft.text).model_dump(mode="json"), "name": name})
    return edited_text(draft, update_text(draft.text, config))


def _with_text(draft: Draft, text: str) -> Draft:
    try:
        config = load_text(text)
    except ConfigError as error:
        return replace(draft, text=text, problems=tuple(error.problems), text_is_newer=True)
    return replace(draft, text=text, values=config.model_dump(mode="json"), problems=(), text_is_newer=False)


def _same(text: str, config: RunConfig) -> bool:
    try:
        return load_text(text) == config
    except ConfigError:
        return False


def preset_for(config: RunConfig) -> str:
    """The built-in config that a config is compared with: the one whose name it bears, else the one of its method."""
    if config.name not in preset_names() and is_built_in(config.name):
        return config.name
    return next((name for name in preset_names() if preset(name).method == config.method), DEFAULT_PRESET)


def differences(config: RunConfig, other: RunConfig) -> list[tuple[str, Any, Any]]:
    """(path, value here, value there) of every setting in which two configs differ, names aside."""
    here, there = flat(config.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    paths = [path for path in dict.fromkeys([*here, *there]) if path != "name"]
    return [(path, here.get(path), there.get(path)) for path in paths if here.get(path) != there.get(path)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        result |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return result


@dataclass(frozen=True)
class Derived:
    """What follows from a config and the project's data. `epoch_rows` is 0 while a dataset is missing."""

    examples_per_step: int
    epoch_rows: int
    num_steps: int
    num_examples: int


def derived(project: Project, config: RunConfig) -> Derived:
    """Rows of an epoch, steps, and examples seen in all."""
    per_step = config.examples_per_step
    try:
        rows = runs.epoch_rows(project, config)
    except DataError:  # the page names what is missing beside these numbers
        return Derived(per_step, 0, config.train.num_steps or 0, (config.train.num_steps or 0) * per_step)
    steps = runs.planned_steps(project, config)
    return Derived(per_step, rows, steps, steps * per_step)
