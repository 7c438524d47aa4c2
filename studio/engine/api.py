"""The model server's HTTP side: OpenAI's `/v1/models` and `/v1/chat/completions`, and the studio's own `/studio/…`."""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from studio.engine.api_bodies import AdapterBody, ChatBody, ColumnBody, CompareBody, SamplingBody
from studio.engine.chat import prompt_ids
from studio.engine.gate import error_answer, error_body
from studio.engine.generate import BASE_ADAPTER, Sampling
from studio.engine.scheduler import Ask, Piece, Scheduler
from studio.engine.served import ModelPool, Ready, Weights
from studio.errors import StudioError
from studio.paths import inside

DEFAULT_MAX_TOKENS = 512
OF_PROMPT = ("template", "num_prompt_tokens", "prompt_sha256")
LOOK_SECONDS = 0.5  # how often to look whether the client is still there


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class Answering:
    """One ask as a coroutine sees it: pieces come out of a queue that the scheduler's thread fills."""

    def __init__(self, weights: Weights, prompt: list[int], sampling: Sampling, stops: list[str]) -> None:
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self.num_prompt_tokens = len(prompt)
        self.weights = weights
        self.began = time.monotonic()
        self.first_token_seconds = 0.0

        def emit(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.ask = Ask(weights, prompt, sampling, emit, stops)

    async def pieces(self, request: Request) -> AsyncIterator[Piece]:
        """Until the last one; ends early, and frees the row, when the client has gone."""
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(self._pieces.get(), LOOK_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                self.first_token_seconds = self.first_token_seconds or time.monotonic() - self.began
                yield piece
                if piece.finish_reason:
                    return
        finally:
            self.ask.cancel()


class Api:
    """Handlers; they share the pool and the scheduler."""

    def __init__(self, scheduler: Scheduler, project_folder: Path) -> None:
        self._scheduler = scheduler
        self._pool: ModelPool = scheduler.pool
        self._project_folder = project_folder

    async def models(self) -> dict[str, Any]:
        data = [
            {"id": one.name, "object": "model", "created": 0, "owned_by": "retune", "weights": one.hash}
            | {"warnings": list(one.warnings)}
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
        self._scheduler.ask(answering.ask)
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            return _sse(self._chat_chunks(answering, head, request, with_usage))
        return JSONResponse(await self._whole_chat(answering, head, request))

    async def compare(self, body: CompareBody, request: Request) -> Response:
        sampling = body.sampling
        if sampling.seed is None:  # one noise for all columns
            sampling = sampling.model_copy(update={"seed": secrets.randbits(31)})
        columns = [await self._prepare(column, column.sampling or sampling, fit=True) for column in body.columns]
        self._scheduler.ask(*(column.ask for column in columns))
        return _sse(self._column_events(columns, request))

    async def add_adapter(self, body: AdapterBody) -> dict[str, Any]:
        folder = inside(self._project_folder, body.path)
        weights = await asyncio.wrap_future(self._scheduler.call(lambda: self._pool.add(body.name, folder)))
        return {"id": weights.name, "weights": weights.hash}

    async def prompt(self, body: ColumnBody) -> dict[str, Any]:
        """The text that a model would read, letter by letter, with what a comparison's proof says of it."""
        answering = await self._prepare(body, SamplingBody(max_tokens=1))
        ready = await self._ready(answering.weights)
        proof = self._proof(answering, ready)
        return {"text": ready.loaded.tokenizer.decode(answering.ask.prompt)} | {key: proof[key] for key in OF_PROMPT}

    async def self_test(self) -> dict[str, Any]:
        return await asyncio.wrap_future(self._scheduler.call(self._pool.self_test))

    async def _ready(self, weights: Weights) -> Ready:
        return await asyncio.wrap_future(self._scheduler.call(lambda: self._pool.ready(weights)))

    def _proof(self, answering: Answering, ready: Ready) -> dict[str, Any]:
        """What made an answer: which weights, spoken to how, decoded how."""
        weights, loaded, prompt = answering.weights, ready.loaded, answering.ask.prompt
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

    async def _prepare(self, column: ColumnBody, sampling: SamplingBody, fit: bool = False) -> Answering:
        """Everything that can be wrong with a request is found here, before an answer begins.

        With `fit` an answer that would be too long for the model is shortened, as long as any answer fits.
        """
        try:
            weights = self._pool.find(column.model)
        except StudioError as error:
            raise ApiError(404, str(error), "model_not_found", "model") from error
        ready = await self._ready(weights)
        prompt = await run_in_threadpool(prompt_ids, ready.loaded, [message.plain() for message in column.messages])
        room = ready.context_limit - len(prompt)
        limit = sampling.limit or min(DEFAULT_MAX_TOKENS, max(room, 1))
        if fit:
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
        return Answering(weights, prompt, row, [*sampling.stops, *ready.loaded.stops])

    async def _whole_chat(self, answering: Answering, head: dict[str, Any], request: Request) -> dict[str, Any]:
        text, last = "", Piece(finish_reason="error", error="The client left.")
        async for piece in answering.pieces(request):
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
        self, answering: Answering, head: dict[str, Any], request: Request, with_usage: bool
    ) -> AsyncIterator[Any]:
        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
            return head | {"object": "chat.completion.chunk", "choices": [choice]}

        yield chunk({"role": "assistant", "content": ""})
        async for piece in answering.pieces(request):
            if piece.error:
                yield error_body(piece.error, "generation_failed")
            elif piece.finish_reason:
                yield chunk({}, piece.finish_reason)
                if with_usage:
                    usage = {"choices": [], "usage": _usage(answering, piece)}
                    yield head | {"object": "chat.completion.chunk"} | usage
            else:
                yield chunk({"content": piece.text})

    async def _column_events(self, columns: Sequence[Answering], request: Request) -> AsyncIterator[Any]:
        """Events of all columns as they come."""
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def follow(number: int, answering: Answering) -> None:
            proof = self._proof(answering, await self._ready(answering.weights))
            await events.put({"column": number, "weights": answering.weights.hash, "proof": proof})
            async for piece in answering.pieces(request):
                await events.put({"column": number} | _news(answering, piece))

        tasks = [asyncio.create_task(follow(number, one)) for number, one in enumerate(columns)]
        try:
            while not all(task.done() for task in tasks) or not events.empty():
                try:
                    yield await asyncio.wait_for(events.get(), LOOK_SECONDS)
                except TimeoutError:
                    continue
        finally:
            for task, column in zip(tasks, columns, strict=True):
                task.cancel()
                column.ask.cancel()


def make_app(scheduler: Scheduler, project_folder: Path) -> FastAPI:
    """Routes and the forms of errors."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    api = Api(scheduler, project_folder)
    app.get("/v1/models", response_model=None)(api.models)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/studio/compare", response_model=None)(api.compare)
    app.post("/studio/prompt", response_model=None)(api.prompt)
    app.post("/studio/selftest", response_model=None)(api.self_test)
    app.post("/studio/adapters", response_model=None)(api.add_adapter)
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(StudioError)(_on_studio_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http_error)
    return app


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_answer(error.status, error.message, error.code, error.param)


async def _on_studio_error(_: Request, error: StudioError) -> Response:
    return error_answer(400, str(error), "invalid_request")


async def _on_invalid(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{place or 'The body'}: {first['msg'].removeprefix('Value error, ')}."
    return error_answer(422, message, "invalid_request", place or None)


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
    seconds = round(time.monotonic() - answering.began, 3)
    first = round(answering.first_token_seconds, 3)
    news = {
        "finish_reason": piece.finish_reason,
        "num_tokens": piece.num_tokens,
        "seconds": seconds,
        "first_token_seconds": first,
    }
    return news | ({"error": piece.error} if piece.error else {})


def _sse(events: AsyncIterator[Any]) -> StreamingResponse:
    async def written() -> AsyncIterator[str]:
        async for event in events:
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(written(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
