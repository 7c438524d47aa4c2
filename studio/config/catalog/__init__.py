"""Built-in configs (presets), one YAML file each, by name."""

from importlib import resources

from studio.config.schema import RunConfig
from studio.config.yaml import load_text
from studio.errors import ConfigError, Problem


def preset_names() -> list[str]:
    return sorted(
        file.name.removesuffix(".yaml") for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """The YAML of a preset, with its comments. Raises ConfigError naming the presets there are."""
    if name not in preset_names():
        raise ConfigError([Problem("preset", f"there is no preset {name!r}", ", ".join(preset_names()))], "catalog")
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def preset(name: str) -> RunConfig:
    return load_text(preset_text(name), name)
