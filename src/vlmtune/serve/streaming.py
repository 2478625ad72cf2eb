"""An answer on its way to the page: one JSON object per line, each in its own chunk of the response.

`{"waiting": true}`: another answer is being generated. `{"text": "..."}`: the text so far goes on with this.
`{"whole": "..."}`: the text so far is this. At the end `{"done": {"tokens": 3, "seconds": 0.2, "cut": false}}` or
`{"error": "..."}`.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
from io import BufferedIOBase
from typing import Any

from vlmtune.errors import DataError
from vlmtune.memory import is_out_of_memory
from vlmtune.serve.answering import stream
from vlmtune.serve.questions import Question

log = logging.getLogger("vlmtune")


class Gone(Exception):
    """The page no longer wants the answer: it was stopped, or closed."""


class Closing(Exception):
    """The server ends."""


class Stream:
    """The body of one response. `generating` is held while the answer is generated; `closing` ends it."""

    def __init__(
        self, connection: socket.socket, file: BufferedIOBase, generating: threading.Lock, closing: threading.Event
    ):
        self.connection, self.file, self.generating, self.closing = connection, file, generating, closing
        self.text = ""

    def answer(self, question: Question) -> bool:
        """Generate the answer and write it. Returns whether the connection can be used again."""
        try:
            self._write(self._generated(question))
            self._chunk(b"")
        except Gone:
            return False
        return not self.closing.is_set()

    def _generated(self, question: Question) -> dict[str, Any]:
        """Write the answer's text; returns the line that ends it."""
        try:
            self._wait()
            try:
                done = stream(
                    question.side,
                    question.record,
                    question.generation,
                    question.seed,
                    self._show,
                    self._look,
                )
            finally:
                self.generating.release()
        except DataError as error:
            return {"error": str(error).replace(f"{question.record.place}: ", "")}
        except Closing:
            return {"error": "the server was ended"}
        except (RuntimeError, MemoryError, ValueError) as error:
            return {"error": _failure(error)}
        return {"done": {"tokens": done.tokens, "seconds": round(done.seconds, 3), "cut": done.is_cut}}

    def _wait(self) -> None:
        """Wait until no other answer is being generated."""
        if self.generating.acquire(blocking=False):
            return
        self._write({"waiting": True})
        while not self.generating.acquire(timeout=0.1):
            self._look()

    def _look(self) -> None:
        """Raise Gone if the page closed the connection, Closing if the server ends."""
        if self.closing.is_set():
            raise Closing
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.connection, selectors.EVENT_READ)
                if selector.select(0) and not self.connection.recv(1, socket.MSG_PEEK):
                    raise Gone
        except OSError as error:
            raise Gone from error

    def _show(self, text: str) -> None:
        if text.startswith(self.text):
            self._write({"text": text[len(self.text) :]})
        else:
            self._write({"whole": text})
        self.text = text

    def _write(self, line: dict[str, Any]) -> None:
        self._chunk(json.dumps(line).encode() + b"\n")

    def _chunk(self, content: bytes) -> None:
        """Raises Gone if it can't be sent."""
        try:
            self.file.write(b"%x\r\n%b\r\n" % (len(content), content))
            self.file.flush()
        except OSError as error:
            raise Gone from error


def _failure(error: Exception) -> str:
    """What the page says of an error that is not the user's; the terminal shows all of it."""
    if is_out_of_memory(error):
        return "out of memory; use a smaller image, fewer tokens, or a new conversation (model.image.max_tokens)"
    log.error("an answer failed", exc_info=error)
    return f"this answer failed, and the terminal shows where: {type(error).__name__}: {error!s:.300}"
