"""Folders that others wrote, or that were damaged: looked at without a crash, and never taken for ours."""

from pathlib import Path

import pytest

from studio.data.talk import WEIGHTS_FILE
from studio.errors import ModelError, StudioError
from studio.weight_folders import require_replaceable, shard_bytes, weight_files


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["x"]}}', "[" * 10**5]
)
def test_an_index_that_cannot_be_read_is_said_so(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json in .* cannot be read"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "deeper/a.safetensors", "a.safetensors"])
def test_files_of_an_index_lie_beside_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "deeper").mkdir(parents=True)
    for place in (tmp_path, folder / "deeper"):
        (place / "a.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"x": "{name}"}}}}')
    with pytest.raises(ModelError, match=r"lacks a\.safetensors"):
        weight_files(folder)
    if name == "a.safetensors":
        (folder / name).touch()
        assert weight_files(folder) == ([folder / name], "safetensors")


@pytest.mark.parametrize("files", ['["a"]', "5", '[{}, "b"]', '"ab"', "null"])
def test_only_what_a_record_lists_is_replaced(tmp_path: Path, files: str) -> None:
    (tmp_path / WEIGHTS_FILE).write_text(f'{{"files": {files}}}')
    require_replaceable(tmp_path)
    (tmp_path / "a").touch()
    if files == '["a"]':
        return require_replaceable(tmp_path)
    with pytest.raises(StudioError, match="'a', which this command did not make"):
        require_replaceable(tmp_path)


@pytest.mark.parametrize(("size", "found"), [("2GB", 2 * 10**9), (" 1.5 mb ", 1_500_000), ("1KB", 1000)])
def test_sizes_of_files(size: str, found: int) -> None:
    assert shard_bytes(size) == found
    with pytest.raises(StudioError, match="is no size"):
        shard_bytes(size.replace("B", "").replace("b", ""))
