"""A model server for tests: speaks the wire of the real one, says what it is told, as slowly as it is told."""

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from studio.chat_client import Connection

STATUS = {
    "loaded": True, "num_answering": 0, "num_waiting": 1, "max_answering": 32, "max_waiting": 128,
    "memory_bytes": 2**30, "keeps_words": False,
}  # fmt: skip


class ModelServer:
    """`asked` collects the bodies of comparisons; `models` what is loaded."""

    def __init__(self, models: Sequence[str] = ("starter",), word_seconds: float = 0.0) -> None:
        self.models = list(models)
        self.asked: list[dict] = []
        self.words = ["I ", "am ", "Luna. ", "![x](http://example.com/x.png) ", "<b>bold</b>"]
        self.word_seconds = word_seconds
        on, beside = {"tuned": {"max_difference": 2.5}}, {"tuned": {"bit_equal": False, "max_difference": 1e-6}}
        off = {"bit_equal": True, "max_difference": 0.0}
        self.self_test = {"num_questions": 3, "off": off, "on": on, "beside": beside}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def connection(self) -> Connection:
        return Connection(f"http://127.0.0.1:{self._http.server_port}", "secret-token")

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def events(self, num_columns: int):
        for column in range(num_columns):
            weights = f"{column}abc1234567890"
            yield {"column": column, "weights": weights, "proof": self.proof(column) | {"weights": weights}}
        for word in self.words:
            time.sleep(self.word_seconds)
            for column in range(num_columns):
                yield {"column": column, "delta": word}
        for column in range(num_columns):
            yield {
                "column": column,
                "finish_reason": "stop",
                "num_tokens": 5,
                "seconds": 0.5,
                "first_token_seconds": 0.1,
            }

    def proof(self, column: int) -> dict:
        sampling = {"max_new_tokens": 96, "temperature": 0.0, "top_p": 1.0, "seed": 0}
        return {
            "base": "starter", "base_fingerprint": "ba5e" * 16, "adapter": "on" if column else "off",
            "template": "7e3" * 16, "prompt_sha256": "900d" * 16, "num_prompt_tokens": 9, "sampling": sampling,
            "dtype": "float32", "bits": 0,
        }  # fmt: skip

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def _send(self, value: object) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/studio/status":
                    return self._send(STATUS | {"num_asked": len(server.asked)})
                kinds = ["base", *["adapter"] * len(server.models)]
                named = zip(server.models, kinds, strict=False)
                self._send({"data": [{"id": n, "kind": k, "weights": "ab", "warnings": []} for n, k in named]})

            def do_DELETE(self) -> None:
                name = self.path.rpartition("/")[2]
                server.models.remove(name)
                self._send({"id": name, "deleted": True})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                if self.path == "/studio/unload":
                    return self._send({"unloaded": True})
                if self.path == "/studio/adapters":
                    server.models.append(body["name"])
                    return self._send({"weights": "abc"})
                if self.path == "/studio/prompt":
                    text = "".join(f"<{each['role']}>{each['content']}" for each in body["messages"])
                    return self._send({"text": text, "prompt_sha256": "900d" * 16, "num_prompt_tokens": 9})
                if self.path == "/studio/selftest":
                    return self._send(server.self_test)
                server.asked.append(body)
                self.send_response(200)
                self.end_headers()
                try:
                    for event in server.events(len(body["columns"])):
                        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    return None
                return None

        return Handler
