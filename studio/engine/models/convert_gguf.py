"""Turns a SmolLM2 GGUF file into a Hugging Face folder: dense bfloat16 weights, tokenizer, chat template."""

import json
from collections.abc import Callable
from pathlib import Path

from studio.errors import ModelError
from studio.paths import atomic_write_json, atomic_write_text

CONTEXT_LENGTH = 8192
BEGIN, END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def gguf_to_folder(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the model into the existing, empty `folder`, and ask it one question to prove that it came through."""
    progress("Unpacking the weights")
    save_weights(gguf, folder)
    progress("Saving the tokenizer")
    save_tokenizer(gguf, folder)
    progress("Asking the model a question")
    check_answer(folder)


def save_weights(gguf: Path, folder: Path) -> None:
    """Dequantise in float32 and save in bfloat16, the type SmolLM2 was published in."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    # Without dequantize=True transformers may keep the 4-bit blocks packed, which cannot be trained.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model = model.to(torch.bfloat16)
    model.config.rms_norm_eps = 1e-5  # GGUF stores it as float32: 9.999999747378752e-06
    model.config.pad_token_id = 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    _tidy_config(folder / "config.json")


def _tidy_config(path: Path) -> None:
    """Drop the GGUF's own name, and state rope_theta where tools older than transformers 5 look for it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    atomic_write_json(path, config)


def save_tokenizer(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend: Tokenizer = loaded.backend_tokenizer
    # The file asks for the pre-tokenizer "smollm", which reads digits one by one; transformers does not know the
    # name and leaves that out, so that "\n\n1." would get other ids than the ones the model was trained with.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    # Padding is not the end-of-turn token: masking padding must never hide the token that ends an answer.
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": PADDING, "pad_token": PADDING}
    atomic_write_json(folder / "special_tokens_map.json", special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    atomic_write_json(folder / "tokenizer_config.json", config)
    atomic_write_text(folder / "chat_template.jinja", loaded.chat_template)


def check_answer(folder: Path) -> None:
    """Load what was written and decode greedily. Raises ModelError when the answer shows that the weights are wrong."""
    answer = greedy_answer(folder, QUESTION)
    if ANSWER not in answer:
        raise ModelError(
            f"The converted starter model answers {QUESTION!r} with {answer!r}, not with {ANSWER}.",
            "The installed transformers version converts this model wrongly; install the pinned one.",
        )


def greedy_answer(folder: Path, question: str, max_new_tokens: int = 24) -> str:
    """The model's greedy answer to one question, without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
