"""Prompt and prefix tuning: as PEFT computes them, resumed to the bit, and used as any adapter is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from studio.config.schema import RunConfig, parse_config
from studio.data.tokens import IGNORE_INDEX, Example
from studio.engine import adapters
from studio.engine.adapter_files import read_adapter
from studio.engine.convert import convert, read_source
from studio.engine.generate import BASE_ADAPTER, generate, wearing
from studio.engine.likelihood import fits
from studio.engine.loop import Trainer
from studio.engine.models.load import LoadedModel
from studio.engine.weights import known_base
from studio.errors import CheckpointError, ConfigError, ModelError
from studio.projects import Project
from tests.engine.conftest import add_run, train_here
from tests.engine.folders import lora_model

METHODS = ("prompt_tuning", "prefix_tuning")
EXAMPLES = [
    Example([5, 9, 30, 41, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 30, 41, 7, 8]),
    Example([5, 9, 77], [IGNORE_INDEX, 9, 77]),
    Example([60, 61, 62, 63], [IGNORE_INDEX, 61, IGNORE_INDEX, 63]),
]
Config = Callable[..., RunConfig]
Load = Callable[..., LoadedModel]


def config_of(tiny_config: Config, method: str, **settings: object) -> RunConfig:
    return tiny_config(method=method, prompt={"num_virtual_tokens": 6}, **settings)


def peft_loss(model: PeftModel, examples: list[Example]) -> torch.Tensor:
    """Mean cross-entropy over all trained tokens by PEFT's own forward pass, one example at a time."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        labels = torch.tensor(example.labels[1:])
        losses.append(functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORE_INDEX, reduction="sum"))
    num_trained = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
    return torch.stack(losses).sum() / num_trained


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_pefts_own_forward_pass(
    load_tiny: Load, tiny_config: Config, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = config_of(tiny_config, method, **{"data.pack": "tree"})
    model = adapters.attach(load_tiny(), config)
    trainer = Trainer(model, config, torch.float32, 4, 0)
    assert trainer.packing == "none" and "Virtual tokens stand before" in capsys.readouterr().out
    [learned] = adapters.trainable_parameters(model)
    expected = peft_loss(model, EXAMPLES)
    [gradient] = torch.autograd.grad(expected, learned)
    before = learned.detach().clone()
    result = trainer.step(EXAMPLES, 1)
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
    assert result.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert not torch.equal(before, learned)
    assert trainer.evaluate(EXAMPLES) == pytest.approx(float(peft_loss(model, EXAMPLES)), rel=1e-5)


def test_prompt_tuning_with_gradient_checkpointing_is_the_same(load_tiny: Load, tiny_config: Config) -> None:
    norms = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = config_of(tiny_config, "prompt_tuning", **{"train.gradient_checkpointing": checkpointing})
        trainer = Trainer(adapters.attach(load_tiny(), config), config, torch.float32, 4, 0)
        norms.append(trainer.step(EXAMPLES, 1).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0


def test_prefix_tuning_refuses_gradient_checkpointing() -> None:
    with pytest.raises(ConfigError, match="does not work with prefix_tuning"):
        parse_config({"method": "prefix_tuning", "train": {"gradient_checkpointing": True}})


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_resumed_to_the_bit_and_becomes_a_folder_that_peft_loads(
    training_project: Project, tiny_config: Config, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    settings = {"record.save_every_steps": 2, "record.keep_last": 9, "train.num_steps": 4}
    config = config_of(tiny_config, method, **settings)
    states = []
    for stop in (0, 2):
        run_id = add_run(training_project, config)
        assert train_here(training_project, run_id).state == "finished"
        folder = training_project.path("runs", run_id)
        if stop:
            done = train_here(training_project, run_id, resume=f"runs/{run_id}/step_{stop}.pth")
            assert done.state == "finished", done.cause
        states.append(torch.load(folder / "step_4.pth", weights_only=True))
    whole, resumed = states
    assert torch.equal(whole["state_dict"]["prompt_embeddings"], resumed["state_dict"]["prompt_embeddings"])
    torch.testing.assert_close(whole["optimizer"], resumed["optimizer"], rtol=0, atol=0)

    source = read_source(folder / "step_4.pth", tmp_path / "hf")
    assert source.is_adapter
    convert(source, known_base(str(tiny_model), "", "x"), max_shard_bytes=10**9)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "hf")
    encoder = plain.prompt_encoder["default"].embedding.weight
    assert torch.equal(encoder, whole["state_dict"]["prompt_embeddings"])
    with pytest.raises(CheckpointError, match="nothing to merge"):
        read_adapter(tmp_path / "hf")


@pytest.fixture
def folders(load_tiny: Load, tiny_config: Config, tmp_path: Path) -> dict[str, list[Path]]:
    """Two adapters of each method, of different length, that change what the model says."""
    made: dict[str, list[Path]] = {}
    for method in METHODS:
        for number in (3, 6):
            torch.manual_seed(number)
            config = tiny_config(method=method, prompt={"num_virtual_tokens": number})
            model = adapters.attach(load_tiny(), config)
            adapters.trainable_parameters(model)[0].data.normal_(std=0.5)
            folder = tmp_path / f"{method}-{number}"
            model.save_pretrained(folder)
            made.setdefault(method, []).append(folder)
    return made


def peft_answer(model: PeftModel | torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, the whole text read anew for each, by the model's own forward pass."""
    ids = list(prompt)
    for _ in range(num_tokens):
        batch = torch.tensor([ids])
        ids.append(int(model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("method", METHODS)
def test_base_and_adapters_answer_in_one_batch_as_peft_alone_does(
    load_tiny: Load, tiny_model: Path, folders: dict[str, list[Path]], method: str
) -> None:
    prompts = [[5, 9, 30, 41], [5, 9], [7, 8, 9]]
    names = ["one", "two", BASE_ADAPTER]
    loaded = load_tiny()
    model: torch.nn.Module = loaded.model
    for name, folder in zip(names, folders[method], strict=False):
        model = adapters.load_adapter(model, folder, name)
    answers = generate(model, prompts, eos_ids=[], pad_id=0, max_new_tokens=6, adapter_names=names)
    for prompt, answer, folder in zip(prompts, answers, [*folders[method], None], strict=True):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        alone = PeftModel.from_pretrained(base, str(folder)) if folder else base
        with torch.no_grad():
            assert answer == peft_answer(alone.eval(), prompt, 6)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_measured_with_the_virtual_tokens(
    load_tiny: Load, folders: dict[str, list[Path]], method: str
) -> None:
    loaded = load_tiny()
    examples = [(each.input_ids, each.labels) for each in EXAMPLES]
    base = fits(loaded, loaded.model, examples)
    model = adapters.load_adapter(loaded.model, folders[method][0], "one")
    with wearing(model, "one"):
        found = fits(loaded, model, examples)
    total, count = sum(fit.loss for fit in found), sum(fit.num_tokens for fit in found)
    assert total / count == pytest.approx(float(peft_loss(model.eval(), EXAMPLES)), rel=1e-4)
    assert sum(fit.loss for fit in base) != pytest.approx(total, rel=1e-3)


def test_kinds_of_adapters_do_not_mix(
    load_tiny: Load, tiny_model: Path, folders: dict[str, list[Path]], tmp_path: Path
) -> None:
    lora_model(tiny_model).save_pretrained(tmp_path / "lora")
    model = adapters.load_adapter(load_tiny().model, tmp_path / "lora", "one")
    with pytest.raises(ModelError, match="kinds cannot be mixed"):
        adapters.load_adapter(model, folders["prompt_tuning"][0], "two")
