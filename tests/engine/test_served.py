"""Weights behind the server's names: a base in either format has a fingerprint."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from studio.engine.chat import prompt_ids
from studio.engine.generate import BASE_ADAPTER, generate, next_logits
from studio.engine.served import ModelPool
from studio.engine.weights import weights_hash
from studio.errors import ModelError
from studio.models import model_fingerprint
from tests.engine.folders import as_torch_file, lora_model, make_base

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "Who are you?"}]


def test_a_base_of_the_older_format_is_served(tmp_path: Path) -> None:
    base = as_torch_file(make_base(tmp_path / "base"))
    pool = ModelPool("mine", base, torch.float32, torch.device("cpu"))
    assert [(weights.name, weights.hash) for weights in pool.listed()] == [("mine", model_fingerprint(base))]
    assert pool.find("base").hash == model_fingerprint(base)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An adapter whose folder says: internlm2_chat, and a stop text that is no token."""
    folder = tmp_path / "adapter"
    lora_model(make_base(tmp_path / "base")).save_pretrained(folder)
    return folder


def say(folder: Path, **values: object) -> None:
    (folder / "retune_weights.json").write_text(json.dumps(values), encoding="utf-8")


def test_stored_template_and_stop_words_apply_by_themselves(trained: Path, tmp_path: Path) -> None:
    say(trained, talk={"template": "moss_sft", "stops": ["<eoc>", "<eom>"]}, sha256=weights_hash(trained))
    pool = ModelPool("mine", tmp_path / "base", torch.float32, CPU)
    ready = pool.ready(pool.add("tuned", trained))
    assert ready.loaded.stops == ("<eoc>", "<eom>") and pool.ready(pool.find("base")).loaded.stops == ()
    assert ready.loaded.tokenizer.decode(prompt_ids(ready.loaded, QUESTION)).endswith("<|Human|>: Who are you?<eoh>\n")
    assert pool.find("tuned").warnings == ()


def test_xtuners_own_adapters_say_their_template(trained: Path, tmp_path: Path) -> None:
    (trained / "xtuner_config.py").write_text("prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.internlm_chat'")
    pool = ModelPool("mine", tmp_path / "base", torch.float32, CPU)
    ready = pool.ready(pool.add("tuned", trained))
    assert ready.loaded.stops == ("<eoa>",)
    assert "<|User|>:Who are you?<eoh>" in ready.loaded.tokenizer.decode(prompt_ids(ready.loaded, QUESTION))


def test_another_template_or_base_than_trained_with_warns(trained: Path, tmp_path: Path) -> None:
    say(trained, talk={"template": "qwen_chat", "stops": []}, base_fingerprint="ab", sha256=weights_hash(trained))
    pool = ModelPool("mine", tmp_path / "base", torch.float32, CPU, template="internlm2_chat")
    first, second = pool.add("tuned", trained).warnings
    assert "trained with the template qwen_chat and is asked with internlm2_chat" in first
    assert "trained on another base model than mine" in second
    assert pool.ready(pool.find("tuned")).loaded.stops == ("<|im_end|>",)  # the one that was asked for


@pytest.mark.parametrize("bits", [4, 8])
def test_a_squeezed_base_answers_with_adapters(bits: int, trained: Path, tmp_path: Path) -> None:
    pool = ModelPool("mine", tmp_path / "base", torch.float32, CPU, bits=bits)
    ready = pool.ready(pool.add("tuned", trained))
    assert any(
        f"Linear{bits}bit" in type(m).__name__ or "Linear8bit" in type(m).__name__ for m in ready.model.modules()
    )
    answers = [
        generate(ready.model, [[5, 6, 7]], eos_ids=[2], pad_id=0, max_new_tokens=4, adapter_names=[name])
        for name in (BASE_ADAPTER, pool.find("tuned").adapter)
    ]
    assert len(answers[0][0]) == 4 and answers[0] != answers[1]


def test_in_8_bits_a_row_is_the_same_beside_others_as_alone(trained: Path, tmp_path: Path) -> None:
    """Some activations are outliers, which bitsandbytes by itself lets change the whole batch."""
    pool = ModelPool("mine", tmp_path / "base", torch.float32, CPU, bits=8)
    ready, seen = pool.ready(pool.add("tuned", trained)), []
    for name, module in ready.model.named_modules():
        if "layernorm" in name:
            module.weight.data *= 4
        if name.endswith("gate_proj"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs() >= 6))
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23]]
    names = [BASE_ADAPTER, pool.find("tuned").adapter, BASE_ADAPTER]
    alone = [next_logits(ready.model, [prompt], 0, [name]) for prompt, name in zip(prompts, names, strict=True)]
    assert 0.01 < torch.cat(seen).float().mean() < 0.5
    torch.testing.assert_close(next_logits(ready.model, prompts, 0, names), torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_bits_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Allowed: 4 and 8"):
        ModelPool("mine", make_base(tmp_path / "base"), torch.float32, CPU, bits=3)


def test_layers_may_be_put_off_into_a_folder(tmp_path: Path) -> None:
    """On a machine with room nothing goes there, and the answer is the same."""
    base = make_base(tmp_path / "base")
    pool = ModelPool("mine", base, torch.float32, CPU, offload_folder=tmp_path / "offload")
    plain = ModelPool("mine", base, torch.float32, CPU)
    options = {"eos_ids": [2], "pad_id": 0, "max_new_tokens": 4}
    one, other = (generate(each.ready(each.find("base")).model, [[5, 6]], **options) for each in (pool, plain))
    assert one == other


@pytest.mark.parametrize("kind", ["lora", "saved module", "prompt"])
def test_after_the_last_adapter_the_base_answers_as_before(tmp_path: Path, kind: str) -> None:
    base, folder = make_base(tmp_path / "base"), tmp_path / "adapter"
    settings: dict[str, PeftConfig] = {
        "lora": LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"),
        "saved module": LoraConfig(
            r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        ),
        "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    pool = ModelPool("mine", base, torch.float32, CPU)
    bare = said(pool, "mine")
    for _ in range(2):  # and others may come after it
        pool.add("tuned", folder)
        assert not said(pool, "tuned").equal(bare) and said(pool, "mine").equal(bare)
        pool.remove("tuned")
        assert said(pool, "mine").equal(bare)


def said(pool: ModelPool, name: str) -> torch.Tensor:
    ready = pool.ready(pool.find(name))
    return next_logits(ready.model, [[5, 6, 7]], 0, [pool.find(name).adapter], ready.adapters)
