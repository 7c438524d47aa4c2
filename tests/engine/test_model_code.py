"""Code of a model folder: not run without consent, run with it, and not run again once a file has changed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from studio import model_code
from studio.engine.models.families import native
from studio.engine.models.load import LoadedModel, load_base
from studio.errors import ModelError
from tests.engine.folders import make_base

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "of_its_own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

open({canary!r}, "a").write("ran ")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_base(tmp_path / "own_model")
    (folder / "own_code.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "of_its_own", "auto_map": auto}))
    return folder


def load(folder: Path) -> LoadedModel:
    return load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_code_runs_with_consent_to_these_very_files_only(tmp_path: Path, folder: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ModelError, match="retune models trust"):
        load(folder)
    assert not canary.exists()
    assert list(model_code.trust(folder)) == ["own_code.py"] and model_code.is_trusted(folder)
    assert type(load(folder).model).__name__ == "OwnModel" and canary.exists()
    canary.unlink()
    (folder / "own_code.py").write_text((folder / "own_code.py").read_text() + "\n# changed\n")
    with pytest.raises(ModelError, match="changed since"):
        load(folder)
    assert not canary.exists()
    model_code.trust(folder)
    model_code.distrust(folder)
    assert not model_code.is_trusted(folder) and not model_code.has_changed(folder)


def test_a_new_file_asks_again_and_code_from_elsewhere_cannot_be_consented_to(folder: Path) -> None:
    model_code.trust(folder)
    (folder / "more").mkdir()
    (folder / "more/extra.py").write_text("x = 1\n")
    assert model_code.has_changed(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/else--code.Config"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another place"):
        model_code.trust(folder)


def test_what_needs_code_is_told_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    assert model_code.need(folder) == "wanted"
    with pytest.raises(ModelError, match="is not run"):
        model_code.require_consent(folder)
    seen = model_code.code_files(folder)
    (folder / "own_code.py").write_text("x = 1\n")
    with pytest.raises(ModelError, match="changed while"):
        model_code.trust(folder, seen)
    model_code.trust(folder, model_code.code_files(folder))
    model_code.require_consent(folder)
    assert model_code.need(folder) == "given" and model_code.source_of(folder, "own_code.py") == "x = 1\n"
    (folder / "own_code.py").write_text("x = 2\n")
    assert model_code.need(folder) == "changed"
    with pytest.raises(ModelError, match="no Python file"):
        model_code.source_of(folder, "../canary")


@pytest.mark.parametrize("kind", ["llama", *model_code.COMPUTED_HERE])
def test_what_is_computed_here_asks_for_no_consent(kind: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    assert model_code.need(folder) == "no"
    assert (native(folder) is not None) == (kind in model_code.COMPUTED_HERE)


def test_a_folder_without_code_has_nothing_to_consent_to(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no Python code"):
        model_code.trust(make_base(tmp_path / "plain"))
