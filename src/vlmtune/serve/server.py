"""An HTTP server for one user on this machine.

Other programs of the machine, and pages of the web in the user's browser, could reach its port. So each address begins
with a secret, requests must name this machine as their host (or a name of the web could be pointed here, by DNS
rebinding), and what comes from another page is refused.
"""

from __future__ import annotations

import hmac
import json
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vlmtune.errors import ConfigError, DataError
from vlmtune.launch import signals
from vlmtune.serve import questions, uploads
from vlmtune.serve.page import page, policy
from vlmtune.serve.sides import Side
from vlmtune.serve.streaming import Stream

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What a browser on this machine calls the host."""
DRAINED = 4 * uploads.MOST_BYTES
"""Bytes of a refused request that are read, so that the browser reads the refusal."""
PATIENCE = 60
"""Seconds until a connection is closed on which nothing comes, or nothing can be sent."""


class Refused(Exception):
    """A request that is answered with a reason, and the end of its connection."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Server(ThreadingHTTPServer):
    """Serves the page for `sides`, on a free port if `port` is 0.

    Raises ConfigError if the port can't be used.
    """

    daemon_threads = True

    def __init__(self, sides: Sequence[Side], port: int = 0):
        self.sides, self.token = list(sides), secrets.token_urlsafe(24)
        self.uploads = uploads.Uploads(min(side.config.data.max_image_pixels for side in sides))
        self.generating = threading.Lock()
        """Held while an answer is generated: sides may share a model, and the random state."""
        self.closing = threading.Event()
        self.about = json.dumps(_about(self.sides)).encode()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(f"port={port}: {error.strerror}; port=0 chooses a free one") from error

    @property
    def address(self) -> str:
        """Of the page, with the secret."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def server_close(self) -> None:
        """Stop listening, and end the answer that is being generated at its next token."""
        self.closing.set()
        super().server_close()
        with self.generating:
            pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser may close a connection at any time; other errors are printed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serving(server: Server, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until Ctrl-C. Other signals raise `Interrupted`."""
    with signals.ending_at_once():
        try:
            on_start()
            server.serve_forever(poll_interval=0.2)
        except signals.Interrupted as ended:
            if ended.number != signal.SIGINT:
                raise
        finally:
            server.server_close()


def _about(sides: Sequence[Side]) -> dict[str, Any]:
    """What the page needs to know."""
    generation = sides[0].config.generation
    return {
        "title": " and ".join(side.name for side in sides if not side.is_untrained),
        "sides": [
            {"name": side.name, "refuses_turns": side.refuses_turns, "needs_image": side.encoder.family.needs_image}
            for side in sides
        ],
        "temperature": generation.temperature,
        "max_new_tokens": generation.max_new_tokens,
        "most_upload_bytes": uploads.MOST_BYTES,
        "most_characters": questions.MOST_CHARACTERS,
    }


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: Server

    def do_GET(self) -> None:
        """The page, what it needs to know, and previews of images."""
        with self._refusing():
            path = self._path()
            if path == "":
                self._send(200, "text/html; charset=utf-8", page().encode())
            elif path == "about":
                self._send(200, "application/json", self.server.about)
            elif path.startswith("images/"):
                self._send(200, "image/jpeg", self.server.uploads.of(path.removeprefix("images/")).preview)
            else:
                raise Refused(404, "no such page")

    def do_POST(self) -> None:
        """An image, or a question."""
        with self._refusing():
            path = self._path()
            if path == "images":
                upload = self.server.uploads.add(self._body(uploads.MOST_BYTES, "the image file"))
                self._say(200, key=upload.key, width=upload.width, height=upload.height)
            elif path == "ask":
                body = self._body(questions.MOST_BYTES, "the conversation")
                self._answer(questions.read(body, self.server.sides, self.server.uploads))
            else:
                raise Refused(404, "no such page")

    def _answer(self, question: questions.Question) -> None:
        self._head(200, "application/x-ndjson", {"Transfer-Encoding": "chunked"})
        stream = Stream(self.connection, self.wfile, self.server.generating, self.server.closing)
        self.close_connection = not stream.answer(question)

    # ---------------------------------------------------------------- what may come in

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Inside, what is refused is answered with its reason."""
        try:
            yield
        except DataError as error:
            self._say(422, error=str(error))
        except Refused as refused:
            self._refuse(refused.status, refused.reason)

    def _path(self) -> str:
        """The path after the secret."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in NAMES:
            raise Refused(403, f"this page is for {HOST} alone")
        if origin is not None and origin != f"http://{hosts[0]}":
            raise Refused(403, "this page answers no other page")
        token, _, path = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the address that the terminal shows, with all of its letters")
        return path

    def _length(self) -> int | None:
        """How many bytes the request's body has; None if it doesn't say."""
        text = self.headers.get("Content-Length", "")
        is_number = text.isascii() and text.isdecimal() and len(text) < 20
        return int(text) if is_number and "Transfer-Encoding" not in self.headers else None

    def _body(self, most: int, what: str) -> bytes:
        """The body of a request, of at most `most` bytes. Raises ConnectionError if less of it comes than was said."""
        length = self._length()
        if length is None:
            raise Refused(411, "the request does not say how long it is")
        if length > most:
            raise Refused(413, f"{what} has {_size(length)}, above {_size(most)}")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError
        return body

    # ---------------------------------------------------------------- what goes out

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        own = {
            "Content-Type": kind,
            "Content-Security-Policy": policy(),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        self.send_response(status)
        for name, value in (own | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        self.wfile.write(content)

    def _say(self, status: int, **values: Any) -> None:
        self._send(status, "application/json", json.dumps(values).encode())

    def _refuse(self, status: int, reason: str) -> None:
        """Say why the request, whose body was not read, is refused; end the connection."""
        self._send(status, "application/json", json.dumps({"error": reason}).encode(), {"Connection": "close"})
        self.close_connection = True
        self.wfile.flush()
        left = min(self._length() or 0, DRAINED)
        while left > 0 and (piece := self.rfile.read(min(left, 2**16))):
            left -= len(piece)

    def version_string(self) -> str:
        """Not which Python this is."""
        return "vlmtune"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the secret."""


def _size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
