"""The model server's HTTP side: OpenAI's `/v1/models` and `/v1/chat/completions`, and the studio's own `/studio/…`.

A request may say, beside `model` (the base's name or "base", an adapter's, a full model's) and `messages`: temperature,
top_p, top_k, repetition_penalty, seed, max_tokens, stop, stream. Each request, and each column of `/studio/compare`,
has its own; all of them are decoded in one batch. What a model server refuses, it says in OpenAI's form of an error:
400 for a request that cannot be answered, 401 without the key, 404 for a model it has not, 429 when too many wait.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from studio.engine.api_bodies import LONGEST_ANSWER, AdapterBody, ChatBody, ColumnBody, CompareBody, SamplingBody
from studio.engine.chat import prompt_ids
from studio.engine.gate import error_answer, error_body
from studio.engine.generate import BASE_ADAPTER, Sampling
from studio.engine.scheduler import Ask, Piece, Scheduler
from studio.engine.served import ModelPool, Ready, Weights
from studio.errors import ServerBusyError, StudioError
from studio.paths import inside
from studio.request_log import Asked, RequestLog

DEFAULT_MAX_TOKENS = 512
OF_PROMPT = ("template", "num_prompt_tokens", "prompt_sha256")
LOOK_SECONDS = 0.25  # how often to look whether the client is still there
RETRY_SECONDS = 2  # after which a client that was refused may ask again


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; 0: as much as the model can."""

    answer_tokens: int = 0
    prompt_tokens: int = 0


NO_LIMITS = Limits()


class Answering:
    """One ask as a coroutine sees it: pieces come out of a queue that the scheduler's thread fills."""

    def __init__(
        self, weights: Weights, ready: Ready, prompt: list[int], sampling: Sampling, stops: Sequence[str]
    ) -> None:
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self.num_prompt_tokens = len(prompt)
        self.weights, self.loaded = weights, ready.loaded
        self.at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.began = time.monotonic()
        self.first_token_seconds: float | None = None
        self.end_seconds: float | None = None
        self.text: list[str] = []
        self.last = Piece(finish_reason="cancelled")

        def emit(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.ask = Ask(weights, prompt, sampling, emit, [*stops, *ready.loaded.stops])

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        return round(time.monotonic() - self.began, 3)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until the last one."""
        while True:
            piece = await self._pieces.get()
            if piece.text:
                self.first_token_seconds = self.first_token_seconds or self.seconds
                self.text.append(piece.text)
            if piece.finish_reason:
                self.last, self.end_seconds = piece, self.seconds
            yield piece
            if piece.finish_reason:
                return


class Api:
    """Handlers; they share the pool, the scheduler and the log of requests."""

    def __init__(self, scheduler: Scheduler, project_folder: Path, log: RequestLog, limits: Limits) -> None:
        self._scheduler = scheduler
        self._pool: ModelPool = scheduler.pool
        self._project_folder = project_folder
        self._log = log
        self._limits = limits

    async def models(self) -> dict[str, Any]:
        data = [
            {"id": one.name, "object": "model", "created": 0, "owned_by": "retune", "weights": one.hash}
            | {"warnings": list(one.warnings), "kind": one.kind}
            for one in self._pool.listed()
        ]
        return {"object": "list", "data": data}

    async def chat(self, body: ChatBody, request: Request) -> Response:
        answering = await self._prepare(body, body)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": answering.weights.hash,
        }
        self._ask([answering])
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            return _Stream([answering], self._chat_chunks(answering, head, request, body, with_usage))
        async with self._attended(request, [answering], [body], body.user):
            return JSONResponse(await self._whole_chat(answering, head))

    async def compare(self, body: CompareBody, request: Request) -> Response:
        seed = secrets.randbits(31)  # one noise for all columns that name no seed
        samplings = [column.sampling or body.sampling for column in body.columns]
        samplings = [each if each.seed is not None else each.model_copy(update={"seed": seed}) for each in samplings]
        columns = [
            await self._prepare(column, sampling, fit=True)
            for column, sampling in zip(body.columns, samplings, strict=True)
        ]
        self._ask(columns)
        return _Stream(columns, self._column_events(columns, request, body))

    async def add_adapter(self, body: AdapterBody) -> dict[str, Any]:
        folder = inside(self._project_folder, body.path)
        weights = await self._on_scheduler(lambda: self._pool.add(body.name, folder))
        return {"id": weights.name, "weights": weights.hash}

    async def prompt(self, body: ColumnBody) -> dict[str, Any]:
        """The text that a model would read, letter by letter, with what a comparison's proof says of it."""
        answering = await self._prepare(body, SamplingBody(max_tokens=1))
        proof = self._proof(answering)
        text = answering.loaded.tokenizer.decode(answering.ask.prompt)
        return {"text": text} | {key: proof[key] for key in OF_PROMPT}

    async def self_test(self) -> dict[str, Any]:
        return await self._on_scheduler(self._pool.self_test)

    def _proof(self, answering: Answering) -> dict[str, Any]:
        """What made an answer: which weights, spoken to how, decoded how."""
        weights, loaded, prompt = answering.weights, answering.loaded, answering.ask.prompt
        return {
            "base": self._pool.base.name,
            "base_fingerprint": self._pool.base.hash,
            "weights": weights.hash,
            "adapter": "full model" if weights.is_full_model else "off" if weights.adapter == BASE_ADAPTER else "on",
            "template": loaded.template.fingerprint,
            "num_prompt_tokens": len(prompt),
            "prompt_sha256": hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
            "sampling": asdict(answering.ask.sampling),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "bits": self._pool.bits,
        }

    async def remove_adapter(self, name: str) -> dict[str, Any]:
        weights = self._found(name)
        await self._on_scheduler(lambda: self._scheduler.remove(weights.name))
        return {"id": weights.name, "deleted": True}

    async def status(self) -> dict[str, Any]:
        """What is loaded, how much there is to do, what the limits are."""
        return self._scheduler.status() | {
            "max_answer_tokens": self._limits.answer_tokens,
            "max_prompt_tokens": self._limits.prompt_tokens,
            "num_asked": self._log.num_asked,
            "keeps_words": self._log.keeps_words,
            "memory_bytes": psutil.Process().memory_info().rss,
        }

    async def unload(self) -> dict[str, Any]:
        """Let go of the weights until somebody asks."""
        return {"unloaded": await self._on_scheduler(self._scheduler.unload_when_idle)}

    def _ask(self, answerings: Sequence[Answering]) -> None:
        try:
            self._scheduler.ask(*(each.ask for each in answerings))
        except ServerBusyError as error:
            raise ApiError(429, str(error), "rate_limit_exceeded") from error

    async def _on_scheduler(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._scheduler.call(function))

    def _found(self, name: str) -> Weights:
        try:
            return self._pool.find(name)
        except StudioError as error:
            raise ApiError(404, str(error), "model_not_found", "model") from error

    @asynccontextmanager
    async def _attended(
        self, request: Request, answerings: Sequence[Answering], columns: Sequence[ColumnBody], user: str
    ) -> AsyncIterator[None]:
        """While answers are on their way: they end when the client goes, and are written down when they have ended."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(LOOK_SECONDS)
            for answering in answerings:
                answering.ask.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            who = user or request.headers.get("user-agent", "")
            for answering, column in zip(answerings, columns, strict=True):
                answering.ask.cancel()
                self._write_down(answering, column, who)

    def _write_down(self, answering: Answering, column: ColumnBody, who: str) -> None:
        last, end_seconds = answering.last, answering.end_seconds
        asked = Asked(
            at=answering.at,
            who=who,
            model=answering.weights.name,
            prompt_tokens=answering.num_prompt_tokens,
            answer_tokens=last.num_tokens,
            seconds=answering.seconds if end_seconds is None else end_seconds,
            first_seconds=answering.first_token_seconds,
            end=last.finish_reason,
            error=last.error,
            prompt=column.messages[-1].content,
            answer="".join(answering.text),
        )
        try:
            self._log.add(asked)
        except OSError as error:  # a full disk must not end answers
            print(f"request not written down: {error}", flush=True)

    async def _prepare(self, column: ColumnBody, sampling: SamplingBody, fit: bool = False) -> Answering:
        """Everything that can be wrong with a request is found here, before an answer begins.

        With `fit` an answer that would be too long for the model is shortened, as long as any answer fits.
        """
        weights = self._found(column.model)
        ready = await self._on_scheduler(lambda: self._pool.ready(weights))
        prompt = await run_in_threadpool(prompt_ids, ready.loaded, [message.plain() for message in column.messages])
        room = ready.context_limit - len(prompt)
        self._require_allowed(len(prompt), sampling.limit, fit)
        limit = min(sampling.limit or DEFAULT_MAX_TOKENS, self._limits.answer_tokens or LONGEST_ANSWER)
        if fit or not sampling.limit:
            limit = min(limit, max(room, 1))
        if limit > room:
            raise ApiError(
                400,
                f"The chat has {len(prompt)} tokens and the answer may have {limit}, together more than the "
                f"{ready.context_limit} that this model can read. Shorten the chat or lower max_tokens.",
                "context_length_exceeded",
                "messages",
            )
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        row = Sampling(
            limit, sampling.temperature, sampling.top_p, seed, max(sampling.top_k, 0), sampling.repetition_penalty
        )
        return Answering(weights, ready, prompt, row, sampling.stops)

    def _require_allowed(self, num_prompt_tokens: int, wanted: int | None, fit: bool) -> None:
        """Raises ApiError for more than one request may ask for."""
        limits = self._limits
        if limits.prompt_tokens and num_prompt_tokens > limits.prompt_tokens:
            raise ApiError(
                400,
                f"The chat has {num_prompt_tokens} tokens; this server reads at most {limits.prompt_tokens}.",
                "context_length_exceeded",
                "messages",
            )
        if limits.answer_tokens and wanted and wanted > limits.answer_tokens and not fit:
            raise ApiError(
                400,
                f"max_tokens is {wanted}; this server answers with at most {limits.answer_tokens}.",
                "max_tokens_exceeded",
                "max_tokens",
            )

    async def _whole_chat(self, answering: Answering, head: dict[str, Any]) -> dict[str, Any]:
        text, last = "", answering.last
        async for piece in answering.pieces():
            text, last = text + piece.text, piece
        if last.error:
            raise ApiError(500, last.error, "generation_failed")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": last.finish_reason,
            "logprobs": None,
        }
        return head | {"object": "chat.completion", "choices": [choice], "usage": _usage(answering, last)}

    async def _chat_chunks(
        self, answering: Answering, head: dict[str, Any], request: Request, body: ChatBody, with_usage: bool
    ) -> AsyncIterator[Any]:
        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
            return head | {"object": "chat.completion.chunk", "choices": [choice]}

        async with self._attended(request, [answering], [body], body.user):
            yield chunk({"role": "assistant", "content": ""})
            async for piece in answering.pieces():
                if piece.error:
                    yield error_body(piece.error, "generation_failed")
                elif piece.finish_reason:
                    yield chunk({}, piece.finish_reason)
                    if with_usage:
                        usage = {"choices": [], "usage": _usage(answering, piece)}
                        yield head | {"object": "chat.completion.chunk"} | usage
                else:
                    yield chunk({"content": piece.text})

    async def _column_events(
        self, columns: Sequence[Answering], request: Request, body: CompareBody
    ) -> AsyncIterator[Any]:
        """Events of all columns as they come."""
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def follow(number: int, answering: Answering) -> None:
            async for piece in answering.pieces():
                await events.put({"column": number} | _news(answering, piece))

        tasks = [asyncio.create_task(follow(number, one)) for number, one in enumerate(columns)]
        open_columns = set(range(len(columns)))
        async with self._attended(request, columns, body.columns, body.user):
            try:
                for number, column in enumerate(columns):
                    yield {"column": number, "weights": column.weights.hash, "proof": self._proof(column)}
                while open_columns:
                    event = await events.get()
                    yield event
                    if event.get("finish_reason"):
                        open_columns.remove(event["column"])
            finally:
                for task in tasks:
                    task.cancel()


def make_app(scheduler: Scheduler, project_folder: Path, log: RequestLog, limits: Limits = NO_LIMITS) -> FastAPI:
    """Routes and the forms of errors."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    api = Api(scheduler, project_folder, log, limits)
    app.get("/v1/models", response_model=None)(api.models)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/studio/compare", response_model=None)(api.compare)
    app.post("/studio/prompt", response_model=None)(api.prompt)
    app.post("/studio/selftest", response_model=None)(api.self_test)
    app.post("/studio/adapters", response_model=None)(api.add_adapter)
    app.delete("/studio/adapters/{name:path}", response_model=None)(api.remove_adapter)
    app.get("/studio/status", response_model=None)(api.status)
    app.post("/studio/unload", response_model=None)(api.unload)
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(StudioError)(_on_studio_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http_error)
    return app


async def _on_api_error(_: Request, error: ApiError) -> Response:
    answer = error_answer(error.status, error.message, error.code, error.param)
    if error.status == 429:
        answer.headers["Retry-After"] = str(RETRY_SECONDS)
    return answer


async def _on_studio_error(_: Request, error: StudioError) -> Response:
    return error_answer(400, str(error), "invalid_request")


async def _on_invalid(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{place or 'The body'}: {first['msg'].removeprefix('Value error, ')}."
    return error_answer(400, message, "invalid_request", place or None)


async def _on_http_error(_: Request, error: HTTPException) -> Response:
    return error_answer(
        error.status_code, f"{error.detail}.", "not_found" if error.status_code == 404 else "invalid_request"
    )


def _usage(answering: Answering, last: Piece) -> dict[str, int]:
    prompt, answer = answering.num_prompt_tokens, last.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _news(answering: Answering, piece: Piece) -> dict[str, Any]:
    if not piece.finish_reason:
        return {"delta": piece.text}
    seconds = answering.end_seconds
    news = {
        "finish_reason": piece.finish_reason,
        "num_tokens": piece.num_tokens,
        "num_prompt_tokens": answering.num_prompt_tokens,
        "seconds": seconds,
        "first_token_seconds": answering.first_token_seconds or seconds,
    }
    return news | ({"error": piece.error} if piece.error else {})


class _Stream(StreamingResponse):
    """Events as they come. A client may be gone before the first one is asked for: its answers end then too."""

    def __init__(self, answerings: Sequence[Answering], events: AsyncIterator[Any]) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(_written(events), media_type="text/event-stream", headers=headers)
        self._answerings = answerings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answering in self._answerings:
                answering.ask.cancel()


async def _written(events: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for event in events:
        yield f"data: {json.dumps(event)}\n\n"  # in ASCII: U+2028 ends a line for some readers
    yield "data: [DONE]\n\n"
