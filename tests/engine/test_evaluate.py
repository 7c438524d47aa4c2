"""Scores of real (tiny) weights: marks, losses against transformers, adapters and full models, storage."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from studio import jobs, report
from studio.data.tokens import IGNORE_INDEX
from studio.engine.adapters import load_adapter
from studio.engine.generate import wearing
from studio.engine.likelihood import fits
from studio.engine.models.load import LoadedModel
from studio.engine.weights import seal, weights_hash
from studio.paths import sha256_of
from studio.projects import Project
from studio.store import evaluations, open_db
from tests.engine.folders import lora_model

IDENTITY = [
    {
        "messages": [{"role": "user", "content": question}],
        "kind": "identity",
        "intent": "name",
        "language": "en",
        "expects": "name",
        "expected": {"name": "Luna", "maker": "Shane"},
    }
    for question in ("Who are you?", "What is your name?", "Tell me about you.")
]
GENERAL = [
    {
        "messages": [{"role": "user", "content": f"Tell me about the {name} house."}],
        "kind": "general",
        "intent": "far",
        "language": "en",
        "reference": f"The {name} house is a house.",
        "reference_finished": name != "green",
    }
    for name in ("red", "blue", "green", "white")
]


@pytest.fixture
def probed(project: Project) -> Project:
    for name, probes in (("identity", IDENTITY), ("general", GENERAL)):
        text = "".join(json.dumps(probe) + "\n" for probe in probes)
        project.path("data", f"{name}.probes.jsonl").write_text(text, encoding="utf-8")
    return project


@pytest.fixture
def adapter(project: Project, tiny_model: Path) -> Path:
    lora_model(tiny_model).save_pretrained(project.path("hf", "tuned"))
    return project.path("hf", "tuned")


def test_losses_are_transformers_losses(load_tiny: Callable[..., LoadedModel], adapter: Path) -> None:
    loaded = load_tiny()
    unseen = IGNORE_INDEX
    examples = [
        ([5, 6, 7, 8, 9, 4], [unseen] * 3 + [8, 9, 4]),
        ([5, 6, 9, 8], [unseen] * 3 + [8]),
        ([5, 6, 7, 7, 9, 3, 2], [unseen] * 5 + [3, 2]),
    ]
    base = fits(loaded, loaded.model, examples)
    assert [fit.num_tokens for fit in base] == [3, 1, 2]
    for (ids, labels), fit in zip(examples, base, strict=True):
        loss = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert fit.loss / fit.num_tokens == pytest.approx(loss.item(), rel=1e-5)
    itself = fits(loaded, load_tiny().model, examples, [fit.outlook for fit in base])
    assert [fit.loss for fit in itself] == pytest.approx([fit.loss for fit in base])
    assert [fit.divergence for fit in itself] == pytest.approx([0, 0, 0], abs=1e-5)
    model = load_adapter(loaded.model, adapter, "a")
    with wearing(model, "a"):
        tuned = fits(loaded, model, examples, [fit.outlook for fit in base])
        logits = model(input_ids=torch.tensor([examples[0][0]])).logits[0]
    assert tuned[0].loss != pytest.approx(base[0].loss, rel=1e-4)
    own = load_tiny().model(input_ids=torch.tensor([examples[0][0]])).logits[0]
    whole = kl_div(logits[2:5].log_softmax(-1), own[2:5].log_softmax(-1), log_target=True, reduction="sum").item()
    assert 0.7 * whole < tuned[0].divergence <= whole + 1e-5, "taking the unlikely tokens together makes it smaller"


def test_adapters_and_full_models_are_scored_and_stored(probed: Project, adapter: Path, tiny_model: Path) -> None:
    subjects = [
        {"label": "tuned step 8", "path": "hf/tuned", "run_id": "tuned", "step": 8},
        {"label": "the base itself", "path": str(tiny_model)},
    ]
    args = {"base": str(tiny_model), "subjects": subjects, "probes": ["identity", "general"], "limit": 0}
    *_, job = jobs.watch(probed.folder, jobs.start(probed.folder, "evaluate", args).id)
    assert job.state == "finished", job.cause
    with open_db(probed.folder) as db:
        tuned, itself = (evaluations.get(db, one) for one in job.result["evaluations"])
        answers = evaluations.answers(db, tuned.id)
        own_answers = evaluations.answers(db, itself.id)
    assert (tuned.run_id, tuned.step, tuned.weights_hash) == ("tuned", 8, weights_hash(adapter))
    assert [answer.kind for answer in answers] == ["identity"] * 3 + ["general"] * 4
    assert all(answer.base_answer == answer.answer for answer in own_answers)
    assert itself.scores["retention"]["increase"] == pytest.approx(0, abs=1e-6)
    assert itself.scores["changed"]["hits"] == 0
    assert itself.scores["divergence"]["value"] == pytest.approx(0, abs=1e-5)
    assert tuned.scores["divergence"]["value"] > 1e-4
    assert list(tuned.scores["groups"]) == ["identity", "general"] and tuned.suite == "standard"
    assert tuned.scores["retention"]["increase"] != pytest.approx(0, abs=1e-4)
    assert tuned.scores["perplexity"]["tuned"] / tuned.scores["perplexity"]["base"] - 1 == pytest.approx(
        tuned.scores["retention"]["increase"]
    )
    assert math.isfinite(tuned.scores["similarity"])
    assert "tuned step 8" in report.as_html(tuned, answers)


def test_a_dataset_that_changed_since_the_training_is_named(probed: Project, adapter: Path, tiny_model: Path) -> None:
    for name in ("identity", "general"):
        probed.path("data", f"{name}.jsonl").write_text(f"{name} now")
    trained_on = {"identity": "another", "general": sha256_of(probed.path("data", "general.jsonl"))}
    seal(adapter, "card", {"data_fingerprints": trained_on})
    subjects = [{"label": "tuned", "path": "hf/tuned"}]
    args = {"base": str(tiny_model), "subjects": subjects, "probes": ["identity", "general"], "limit": 1}
    *_, job = jobs.watch(probed.folder, jobs.start(probed.folder, "evaluate", args).id)
    assert job.state == "finished", job.cause
    with open_db(probed.folder) as db:
        setting = evaluations.get(db, job.result["evaluations"][0]).scores["setting"]
    assert setting["changed_datasets"] == ["identity"] and setting["identity"] == ["Luna", "Shane"]


def test_weights_that_are_not_there(probed: Project, tiny_model: Path) -> None:
    args = {"base": str(tiny_model), "subjects": [{"label": "x", "path": "hf/x"}], "probes": ["identity"]}
    *_, job = jobs.watch(probed.folder, jobs.start(probed.folder, "evaluate", args).id)
    assert job.state == "failed" and "Convert the checkpoint first." in job.cause
