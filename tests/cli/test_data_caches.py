"""`retune data tokenize` and `retune data caches`."""

import json
from pathlib import Path

from studio.projects import Project
from tests.cli.conftest import Retune, settings


def test_tokens_are_made_listed_and_deleted(retune: Retune, project: Project, tiny_model: Path) -> None:
    assert "No token caches" in retune("data", "caches")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 12)
    (made,) = json.loads(retune("data", "tokenize", "starter_lora", *settings(tiny_model), "--json"))
    assert made["dataset"] == "identity" and made["num_rows"] >= 12 and made["num_trained_tokens"] > 50
    again = retune("data", "tokenize", "starter_lora", *settings(tiny_model, "data.max_length=64"))
    assert f"{made['num_rows']}" in again and "identity" in again
    listed = json.loads(retune("data", "caches", "--json"))
    assert len(listed) == 2 and listed[1]["key"] == made["key"] and listed[1]["num_bytes"] > 500
    assert made["key"] in retune("data", "caches")
    assert made["key"] in retune("data", "caches", "--delete", made["key"])
    assert "no token cache" in retune("data", "caches", "--delete", made["key"], code=1)
    assert "not both" in retune("data", "caches", "--delete", "x", "--delete-all", code=1)
    assert "Deleted" in retune("data", "caches", "--delete-all")
    assert json.loads(retune("data", "caches", "--json")) == []
