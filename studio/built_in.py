"""The built-in configs as a person looks for them: by model, method, data, size, and whether this machine has room."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from studio import estimate, machine, model_shapes
from studio.config import catalog
from studio.config.catalog import Entry
from studio.config.catalog.base_models import MODELS, Shape
from studio.config.catalog.compose import config_of
from studio.config.catalog.recipes import RECIPES
from studio.config.schema import RunConfig
from studio.machine import Device

BYTES_A_WEIGHT = {"full": 16.0, "lora": 2.0, "qlora": 0.52}  # of experts that a shape's sizes do not count
NEWER_RECIPES = ("alpaca", "custom_sft")  # shown for models that XTuner has no config for; the grammar makes others


@dataclass(frozen=True)
class BuiltIn:
    """One row: `billions` of weights, `memory_bytes` at a step's peak when every example is as long as may be."""

    name: str
    family: str
    base: str
    billions: float
    method: str
    recipe: str
    about: str
    task: str
    memory_bytes: int
    fits: bool
    missing: str


def listed(device: Device | None = None) -> tuple[BuiltIn, ...]:
    """XTuner's configs, and for each newer model some that the grammar makes; those that fit `device` are marked."""
    return _listed(device or machine.device())


@cache
def _listed(device: Device) -> tuple[BuiltIn, ...]:
    return tuple(_row(entry, device) for entry in [*catalog.built_in().values(), *_newer()])


def _newer() -> list[Entry]:
    known = {entry.line.model for entry in catalog.built_in().values()}
    return [
        catalog.entry(f"{model}_{method}_{recipe}_e{RECIPES[recipe].epochs}")
        for model in MODELS
        if model not in known
        for method in ("qlora", "lora", "full")
        for recipe in NEWER_RECIPES
    ]


def _row(entry: Entry, device: Device) -> BuiltIn:
    needed = memory_bytes(config_of(entry), entry.model.shape, device)
    return BuiltIn(
        entry.name, entry.model.family, entry.base, entry.model.shape.billions, entry.method, entry.line.recipe,
        RECIPES[entry.line.recipe].about, entry.line.task, needed, needed <= device.memory_bytes, entry.missing,
    )  # fmt: skip


def memory_bytes(config: RunConfig, shape: Shape, device: Device) -> int:
    """What a step of `config` holds at most on `device`, from the model's published sizes."""
    sizes = model_shapes.shapes_of(shape.config())
    counted = estimate.memory(config, sizes, estimate.longest_load(config, device), device).total
    uncounted = max(0.0, shape.num_billions * 1e9 - sizes.num_weights)
    return round(counted + uncounted * BYTES_A_WEIGHT[config.method])


def search(
    rows: Sequence[BuiltIn],
    words: str = "",
    families: Sequence[str] = (),
    methods: Sequence[str] = (),
    recipes: Sequence[str] = (),
    only_fitting: bool = False,
    max_billions: int = 0,
    max_memory_gib: int = 0,
) -> list[BuiltIn]:
    """The rows that have every word somewhere (name, base, what the data is), and are of the families, methods,
    recipes, size and memory chosen; an empty choice and 0 take all."""
    wanted = words.lower().split()
    return [
        row
        for row in rows
        if (not families or row.family in families)
        and (not methods or row.method in methods)
        and (not recipes or row.recipe in recipes)
        and (row.fits or not only_fitting)
        and (not max_billions or row.billions <= max_billions)
        and (not max_memory_gib or row.memory_bytes <= max_memory_gib * estimate.GIB)
        and all(word in f"{row.name} {row.base} {row.about} {row.task}".lower() for word in wanted)
    ]
