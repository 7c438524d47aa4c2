"""A run with a named template: trained, sampled, converted and answered with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.data.named import NamedTemplate, load_template
from studio.data.tokens import encode_prompt
from studio.engine.chat import prompt_ids
from studio.engine.models.load import LoadedModel
from studio.engine.weights import copy_talk, copy_tokenizer, write_named_template
from studio.errors import DataError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? <|im_end|>"}]


@pytest.mark.parametrize("name", ["phi3_chat", "internlm2_chat", "vicuna", "chatglm2"])
def test_weights_are_spoken_to_as_they_were_trained(
    name: str, load_tiny: Callable[..., LoadedModel], tiny_model: Path, tmp_path: Path
) -> None:
    trained = load_tiny(template=name)
    assert isinstance(trained.template, NamedTemplate)
    copy_tokenizer(tiny_model, tmp_path)
    write_named_template(name, tiny_model, tmp_path)
    served = load_tiny().with_template_of(tmp_path)
    expected = encode_prompt(CHAT, load_template(name, tiny_model), trained.tokenizer)
    assert prompt_ids(trained, CHAT) == prompt_ids(served, CHAT) == expected
    assert trained.tokenizer.token_id("<|im_end|>") in served.eos_ids


def test_weights_without_a_template_are_spoken_to_as_the_base(
    load_tiny: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = load_tiny()
    assert loaded.with_template_of(tmp_path) is loaded


def test_stop_words_that_are_tokens_end_answers(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}', encoding="utf-8")
    write_named_template("qwen_chat", tiny_model, tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"][0] == 0 and len(config["eos_token_id"]) == 2 and config["temperature"] == 0.5


def test_a_merged_model_keeps_what_its_adapter_says(tiny_model: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for folder in (adapter, merged):
        folder.mkdir()
        copy_tokenizer(tiny_model, folder)
    write_named_template("zephyr", tiny_model, adapter)
    copy_talk(adapter, merged)
    assert (merged / "chat_template.jinja").read_bytes() == (adapter / "chat_template.jinja").read_bytes()


def test_a_model_without_a_template_can_be_trained_with_a_named_one(
    load_tiny: Callable[..., LoadedModel], tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="data.template"):
        load_template("", base)
    assert load_template("qwen_chat", base).render(CHAT[1:]).startswith("<|im_start|>user\n")
