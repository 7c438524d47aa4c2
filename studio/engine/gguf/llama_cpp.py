"""llama.cpp itself, through whichever Python package of it is installed: it runs a GGUF file and renders its template.

`llama-cpp-python` is compiled where it is installed. `xllamacpp` comes compiled, with llama.cpp's server inside, which
is asked over the loopback; that server also renders chat templates as llama.cpp does, in C++.
"""

import math
import secrets
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import torch
from torch import Tensor

from studio.data.template import ChatTemplate
from studio.engine.equality import NOT_TOLD, Reference
from studio.errors import ModelError

F32 = 0
"""ggml's number for float32: what keys and values are kept in here, so that only the weights are rounded."""
TOLD = 1000
"""llama.cpp's server is asked for the probabilities of so many tokens at each place, the likeliest ones."""
FORCED = 1e6
SECONDS = 600


class Runtime(Protocol):
    """A GGUF file in llama.cpp. `name` says which package runs it, with its version."""

    name: str

    def prompt(self, question: str) -> list[int]:
        """Ids of a chat that asks this, by the file's own template and tokenizer."""
        ...

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Log-probabilities for each token of the answer and the one after it: (len(answer) + 1, vocabulary).

        Minus infinity stands where llama.cpp did not tell one, being among the least likely.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def is_installed() -> bool:
    return any(find_spec(package) is not None for package in RUNTIMES)


def open_file(path: Path, expected: Reference, threads: int) -> Runtime:
    """Load a file with room for what it will be asked. Raises ModelError when llama.cpp refuses it."""
    for package, runtime in RUNTIMES.items():
        if find_spec(package) is not None:
            try:
                return runtime(path, expected, threads)
            except (RuntimeError, ValueError, OSError) as error:
                raise ModelError(f"llama.cpp refuses {path.name}: {error}.", "The job's log says more.") from error
    raise ModelError("llama.cpp is not installed.", "pip install 'retune[gguf]'")


class PythonRuntime:
    """llama-cpp-python."""

    def __init__(self, path: Path, expected: Reference, threads: int) -> None:
        from llama_cpp import Llama

        num_positions = expected.num_positions + 1

        self._llama = Llama(
            str(path), n_ctx=num_positions, n_batch=num_positions, n_threads=threads, n_gpu_layers=0, logits_all=True,
            type_k=F32, type_v=F32, flash_attn=False, verbose=False,
        )  # fmt: skip
        self.name = f"llama-cpp-python {metadata.version('llama-cpp-python')}"

    def prompt(self, question: str) -> list[int]:
        facts = self._llama.metadata
        template = ChatTemplate(facts.get("tokenizer.chat_template", ""), self._special_tokens())
        text = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        return list(self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=True))

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        ids = [*prompt, *answer]
        self._llama.reset()
        self._llama.eval(ids)
        scores = np.array(self._llama.scores[len(prompt) - 1 : len(ids)], dtype=np.float32)
        return torch.from_numpy(scores).log_softmax(-1)

    def close(self) -> None:
        self._llama.close()

    def _special_tokens(self) -> dict[str, str]:
        named = {"bos_token": self._llama.token_bos(), "eos_token": self._llama.token_eos()}
        return {
            name: self._llama.detokenize([number], special=True).decode("utf-8", "replace")
            for name, number in named.items()
            if number >= 0
        }


class ServerRuntime:
    """xllamacpp: llama.cpp's server in this process, on a free port of the loopback, with a key of its own."""

    def __init__(self, path: Path, expected: Reference, threads: int) -> None:
        import xllamacpp

        num_positions = expected.num_positions + 1
        key = secrets.token_urlsafe()
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_batch, settings.n_parallel = num_positions, num_positions, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.hostnames, settings.port, settings.api_keys = ["127.0.0.1"], 0, [key]
        settings.warmup = settings.ui = False
        settings.verbosity = 1
        self._server = xllamacpp.Server(settings)
        self._http = httpx.Client(
            base_url=self._server.listening_address, timeout=SECONDS, trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        )  # fmt: skip
        self._vocabulary, self._end = expected.logits[0].shape[-1], expected.ends[0]
        self.name = f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})"

    def prompt(self, question: str) -> list[int]:
        text = self._ask("/apply-template", messages=[{"role": "user", "content": question}])["prompt"]
        return list(self._ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        rows = torch.full((len(answer) + 1, self._vocabulary), NOT_TOLD)
        for place, row in enumerate(rows):
            told = self._expects([*prompt, *answer[:place]])
            row[list(told)] = torch.tensor(list(told.values()))
        return rows

    def close(self) -> None:
        self._http.close()
        del self._server

    def _expects(self, ids: list[int]) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens.

        The server keeps back those of a token that is half a character. So it is made to choose the end of the answer,
        which is none; what it tells are the model's own probabilities, from before that choice.
        """
        end = [[self._end, FORCED]]
        body = {"prompt": ids, "n_predict": 1, "n_probs": min(TOLD, self._vocabulary), "logit_bias": end}
        found = self._ask("/completion", **body, temperature=0, cache_prompt=True).get("completion_probabilities")
        if not found:
            raise ModelError("llama.cpp does not tell what it expects.", "The job's log says more.")
        told = {top["id"]: top["logprob"] for top in found[0]["top_logprobs"]}
        # JSON has null for NaN (a damaged file makes all of it), and for the logarithm of nothing (the unlikeliest).
        null = math.nan if all(logprob is None for logprob in told.values()) else NOT_TOLD
        return {token: null if logprob is None else logprob for token, logprob in told.items()}

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        try:
            reply = self._http.post(path, json=body)
            found = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ModelError(f"llama.cpp does not answer: {error}.", "The job's log says more.") from error
        if reply.is_error:
            raise ModelError(f"llama.cpp refuses {path}: {found.get('error', found)}.", "The job's log says more.")
        return dict(found)


RUNTIMES: dict[str, type[PythonRuntime] | type[ServerRuntime]] = {
    "llama_cpp": PythonRuntime,
    "xllamacpp": ServerRuntime,
}
