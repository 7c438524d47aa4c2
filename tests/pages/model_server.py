"""A model server for tests: speaks the wire of the real one, says what it is told, as slowly as it is told."""

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from studio.chat_client import Connection


class ModelServer:
    """`asked` collects the bodies of comparisons; `models` what is loaded."""

    def __init__(self, models: Sequence[str] = ("starter",), word_seconds: float = 0.0) -> None:
        self.models = list(models)
        self.asked: list[dict] = []
        self.words = ["I ", "am ", "Luna. ", "![x](http://example.com/x.png) ", "<b>bold</b>"]
        self.word_seconds = word_seconds
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
            yield {"column": column, "weights": f"{column}abc1234567890"}
        for word in self.words:
            time.sleep(self.word_seconds)
            for column in range(num_columns):
                yield {"column": column, "delta": word}
        for column in range(num_columns):
            yield {"column": column, "finish_reason": "stop", "num_tokens": 5, "seconds": 0.5}

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
                self._send({"data": [{"id": name} for name in server.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/studio/adapters":
                    server.models.append(body["name"])
                    return self._send({"weights": "abc"})
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
