"""What `model.base` may say, and when a folder counts as a model."""

import json
from pathlib import Path

import pytest

from studio import models
from studio.errors import ModelError


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    ("base", "kind", "model_id", "folder"),
    [
        ("starter", "starter", "starter", "starter"),
        (" starter ", "starter", "starter", "starter"),
        (
            "Qwen/Qwen2.5-0.5B-Instruct",
            "huggingface",
            "Qwen/Qwen2.5-0.5B-Instruct",
            "huggingface--Qwen--Qwen2.5-0.5B-Instruct",
        ),
        ("modelscope:qwen/Qwen2.5-7B", "modelscope", "qwen/Qwen2.5-7B", "modelscope--qwen--Qwen2.5-7B"),
    ],
)
def test_a_name_has_one_folder_below_the_models_root(base: str, kind: str, model_id: str, folder: str) -> None:
    model = models.resolve(base)
    assert (model.kind, model.id, model.folder, model.present) == (kind, model_id, models.models_root() / folder, False)


@pytest.mark.parametrize(
    "base",
    [
        "", " ", "a b", "name-only", "../../etc", "a/../b", "~/../../etc", "owner/..", "owner/na--me", "--owner/name",
        "-rf/name", "http://example.org/model", "https://example.org/owner/name", "file:///etc", "owner/name/more",
        "owner/name?x=1", "owner/name\n", "owner\\name", "modelscope:", "modelscope:../../etc", "modelscope:/etc",
        "own\0er/name", "/a\0b", "~nosuchuser-retune/model", "owner/" + "n" * 200, "所有者/模型",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_allowed(base: str) -> None:
    if base == "owner/name\n":  # surrounding white space is a slip of the hand, not an attack
        assert models.resolve(base).id == "owner/name"
        return
    with pytest.raises(ModelError, match="Allowed: `starter`"):
        models.resolve(base)


@pytest.mark.parametrize("base", [None, 7, ["starter"]])
def test_a_base_of_another_type_is_refused(base: object) -> None:
    with pytest.raises(ModelError, match="does not name a base model"):
        models.resolve(base)  # type: ignore[arg-type]


def test_a_local_folder_is_taken_as_it_is(roots: Path) -> None:
    folder = write_model(roots / "home" / "mine" / "model")
    for base in (str(folder), "mine/model", "./mine/model"):
        model = models.resolve(base)
        assert (model.kind, model.folder, model.present) == ("folder", folder, True)
        assert models.require(base) == folder


def test_require_names_every_missing_part(roots: Path) -> None:
    folder = roots / "half"
    folder.mkdir()
    with pytest.raises(ModelError, match="config.json is missing, tokenizer.json is missing, weights are missing"):
        models.require(str(folder))
    with pytest.raises(ModelError, match="there is no such folder"):
        models.require(str(roots / "nowhere"))


def test_require_names_the_missing_part_of_split_weights(roots: Path) -> None:
    folder = write_model(roots / "split")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors is missing"):
        models.require(str(folder))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert models.require(str(folder)) == folder


def test_a_model_to_fetch_is_asked_for_by_its_command() -> None:
    with pytest.raises(ModelError, match="retune models fetch Qwen/Qwen2.5-0.5B"):
        models.require("Qwen/Qwen2.5-0.5B")


def test_a_fetched_folder_is_present_only_with_a_complete_manifest() -> None:
    folder = write_model(models.models_root() / "starter")
    assert not models.resolve("starter").present
    models.write_manifest(folder, "starter", "starter", "test")
    assert models.require("starter") == folder
    (folder / "model.safetensors").write_bytes(b"short")
    assert not models.resolve("starter").present
    (folder / "model.safetensors").unlink()
    assert not models.resolve("starter").present


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": []}', '{"files": {}}'])
def test_a_damaged_manifest_means_not_present(text: str) -> None:
    folder = write_model(models.models_root() / "starter")
    (folder / models.MANIFEST_NAME).write_text(text, encoding="utf-8")
    assert not models.resolve("starter").present
    assert models.list_models() == []


def test_verify_finds_a_flipped_bit_of_equal_size() -> None:
    folder = write_model(models.models_root() / "starter", b"weights")
    models.write_manifest(folder, "starter", "starter", "test")
    assert models.verify(folder) == []
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert models.verify(folder) == ["model.safetensors"]


def test_the_list_shows_names_that_resolve_to_the_same_folder() -> None:
    for base, kind in [("a/model", "huggingface"), ("modelscope:a/model", "modelscope"), ("starter", "starter")]:
        model = models.resolve(base)
        models.write_manifest(write_model(model.folder), kind, model.id, "test")
    write_model(models.models_root() / "huggingface--half--done")
    listed = models.list_models()
    assert [model.name for model in listed] == ["starter", "a/model", "modelscope:a/model"]
    assert all(models.require(model.name) == model.folder for model in listed)
    assert all(model.size_bytes >= len(b"weights") for model in listed)


def test_the_fingerprint_is_of_the_content_not_of_the_place(roots: Path) -> None:
    ours = write_model(models.models_root() / "starter")
    models.write_manifest(ours, "starter", "starter", "test")
    theirs = write_model(roots / "copy")
    (theirs / "README.md").write_text("not part of the model", encoding="utf-8")
    assert models.model_fingerprint(ours) == models.model_fingerprint(theirs)


def test_the_fingerprint_follows_a_change_and_leaves_a_foreign_folder_untouched(roots: Path) -> None:
    folder = write_model(roots / "foreign")
    names = sorted(path.name for path in folder.iterdir())
    first = models.model_fingerprint(folder)
    assert models.model_fingerprint(folder) == first
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert models.model_fingerprint(folder) != first
    assert sorted(path.name for path in folder.iterdir()) == names
