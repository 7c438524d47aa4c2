"""Who may speak to the model server at all, and the form in which it refuses."""

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse, Response

MAX_BODY_BYTES = 2_000_000
ERROR_TYPES = {"rate_limit_exceeded": "rate_limit_error", "generation_failed": "server_error"}  # by code


class Gate:
    """Lets in who names this server as the host and knows its key; notes when somebody last asked for an answer.

    Looking at what is loaded is not asking: a page that is open must not keep weights in memory.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], token: str, hosts: set[str]) -> None:
        self._app, self._token, self._hosts = app, token.encode(), hosts
        self._num_active = 0
        self._last_asked = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return 0.0 if self._num_active else time.monotonic() - self._last_asked

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if refusal := self._refusal({key.lower(): value for key, value in scope["headers"]}):
            return await refusal(scope, receive, send)
        if scope["method"] == "GET":
            return await self._app(scope, receive, send)
        self._num_active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_active -= 1
            self._last_asked = time.monotonic()
        return None

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        if headers.get(b"host", b"").decode("latin-1").lower() not in self._hosts:
            return error_answer(421, "This server answers to its own address alone.", "wrong_host")
        if not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + self._token):
            return error_answer(
                401, "The key is missing or wrong; the Serve page and `retune server key` show it.", "invalid_api_key"
            )
        if b"transfer-encoding" in headers:
            return error_answer(411, "The request does not say how long it is.", "length_required")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return error_answer(413, f"The request is larger than {MAX_BODY_BYTES} bytes.", "request_too_large")
        return None


def error_answer(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """A refusal as OpenAI words it."""
    return JSONResponse(error_body(message, code, param), status)


def error_body(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(code, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
