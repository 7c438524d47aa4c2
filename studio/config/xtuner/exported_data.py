"""The data part of an exported config: each source as XTuner reads it, or as rows written beside the config."""

from dataclasses import dataclass

from studio.config.schema import EVERY_ROW, Recipe, RunConfig
from studio.models import MODELSCOPE_PREFIX

XTUNER_MAPS = {
    "alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitant", "default", "law_reference", "medical",
    "msagent_react", "oasst1", "openai", "openorca", "pretrain", "sql", "stack_exchange", "tiny_codes", "wizardlm",
}  # fmt: skip
OURS = {"crime_kg_assitan": "crime_kg_assitant", "messages": "openai"}  # formats that have another name there
OWN_LAYOUT = "xtuner"  # rows of turns, which need no map
MOSS = "moss_sft"


@dataclass(frozen=True)
class DataPart:
    """`text` sets the variables of the datasets, `dataset` is what the loader takes, `imports` are the lines that both
    need. `written` are the sources whose rows XTuner cannot read where they are: {name: file beside the config}."""

    text: str
    dataset: str
    imports: list[str]
    written: dict[str, str]


def data_part(config: RunConfig, stem: str, template: str) -> DataPart:
    """For a config file of that stem; `template` is XTuner's word for the prompt template."""
    sources = config.data.sources
    written = {name: f"{stem}_data/{name}.jsonl" for name in sources if not _reads(config.data.recipes.get(name))}
    texts = [_dataset(config, name, template, written.get(name, "")) for name in sources]
    variables = [_variable(name) for name in sources]
    dataset = f"dict(type=ConcatDataset, datasets=[{', '.join(variables)}])" if len(variables) > 1 else variables[0]
    return DataPart("\n\n".join(texts), dataset, _imports(config, written), written)


def _reads(recipe: Recipe | None) -> bool:
    """Whether XTuner has a map for rows of a recipe, where they are."""
    return recipe is not None and (recipe.format in (OWN_LAYOUT, MOSS) or bool(_map_name(recipe.format)))


def _map_name(format: str) -> str:
    """XTuner's map for a format; "" where it has none."""
    name = OURS.get(format, format)
    return name if name in XTUNER_MAPS else ""


def _variable(name: str) -> str:
    return "data_" + name.replace("-", "_")


def _dataset(config: RunConfig, name: str, template: str, written: str) -> str:
    recipe = config.data.recipes.get(name)
    if recipe and recipe.format == MOSS:
        return f"""{_variable(name)} = dict(
    type=MOSSSFTDataset,
    data_file={recipe.source!r},
    tokenizer=tokenizer,
    max_length=max_length)"""
    map_name = _map_name(recipe.format) if recipe and not written else ""
    rows = getattr(config.data.sources[name], "rows", None)
    limit = f"\n    max_dataset_length={rows}," if rows and config.data.sources[name] != EVERY_ROW else ""
    filled = "dict(\n        type=template_map_fn_factory, template=prompt_template)" if template != "None" else "None"
    kind = "process_ms_dataset" if recipe and _is_modelscope(recipe) and not written else "process_hf_dataset"
    return f"""{_variable(name)} = dict(
    type={kind},
    dataset=dict({_loaded(recipe, written)}),
    tokenizer=tokenizer,
    max_length=max_length,{limit}
    dataset_map_fn={f"{map_name}_map_fn" if map_name else None},
    template_map_fn={filled},
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack_to_max_length,
    use_varlen_attn=use_varlen_attn)"""


def _is_modelscope(recipe: Recipe) -> bool:
    return recipe.source.startswith(MODELSCOPE_PREFIX)


def _loaded(recipe: Recipe | None, written: str) -> str:
    """What loads the rows, with its settings."""
    if recipe is None or written:
        return f"type=load_dataset, path='json', data_files=dict(train={written!r})"
    source = recipe.source.removeprefix("hf:").removeprefix(MODELSCOPE_PREFIX)
    if source == recipe.source:
        return f"type=load_dataset, path='json', data_files=dict(train={source!r})"
    place, subset = ("dataset_name", "subset_name") if _is_modelscope(recipe) else ("path", "name")
    parts = [f"type={'MsDataset.load' if _is_modelscope(recipe) else 'load_dataset'}", f"{place}={source!r}"]
    parts += [f"{subset}={recipe.subset!r}"] if recipe.subset else []
    parts += [f"split={recipe.split!r}"] if recipe.split != "train" else []
    return ", ".join(parts)


def _imports(config: RunConfig, written: dict[str, str]) -> list[str]:
    recipes = [recipe for name, recipe in config.data.recipes.items() if name not in written]
    maps = sorted({f"{name}_map_fn" for recipe in recipes if (name := _map_name(recipe.format))})
    kinds = {"ConcatDataset", "process_hf_dataset"} | {"MOSSSFTDataset" for each in recipes if each.format == MOSS}
    lines = [f"from xtuner.dataset.map_fns import {', '.join([*maps, 'template_map_fn_factory'])}"]
    if any(map(_is_modelscope, recipes)):
        lines.insert(0, "from modelscope.msdatasets import MsDataset")
        kinds.add("process_ms_dataset")
    return [*lines, f"from xtuner.dataset import {', '.join(sorted(kinds))}"]
