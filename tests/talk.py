"""A page's server in a thread, and how a program talks to it."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tiny
import vlmtune
from vlmtune.launch import session
from vlmtune.models.load import load
from vlmtune.prompt.encode import Encoder
from vlmtune.serve import Server, Side


def tuned(folder: Path, checkpoint: Path, *more: str) -> Path:
    """A finished run of one step, which changes its answers."""
    rows = [(f"what is {i}?", ("red", "a blue circle")[i % 2]) for i in range(4)]
    table = tiny.write_csv(folder, rows, per_image=2)
    model = ["model=auto", f"model.path={checkpoint}", "adapter=lora", "data=csv", f"data.train={table}"]
    steps = ["trainer.max_steps=1", "trainer.batch_size=2", "trainer.learning_rate=0.01", "tracker=none"]
    few = ["trainer.share_prefix=off", "trainer.eval_baseline=false", "data.cache_features=off"]
    vlmtune.train([*model, *steps, *few, "generation.max_new_tokens=8", f"hydra.run.dir={folder / 'tuned'}", *more])
    return folder / "tuned"


def side(name: str, checkpoint: Path) -> Side:
    """A model that was never tuned, as one of the page's."""
    config = tiny.config(checkpoint)
    config.generation.max_new_tokens = 12
    engine = session.engine(config, trains=False)
    types = {"dtype": torch.float32, "compute_dtype": torch.float32}
    model, processor = load(config.model, config.quantization, device=engine.device, **types)
    return Side(name, model.eval(), Encoder.of(processor, config), engine, config)


@contextmanager
def served(sides: Sequence[Side]) -> Iterator[Server]:
    server = Server(sides)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Client:
    """One connection to a server."""

    def __init__(self, server: Server):
        self.server = server
        self.connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, path: str, body: bytes | None = None, token: str | None = None, **headers: str) -> Any:
        """Send a request, and return the response once its head is there."""
        address = f"/{self.server.token if token is None else token}/{path}"
        self.connection.request("GET" if body is None else "POST", address, body, headers)
        return self.connection.getresponse()

    def json(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        response = self.send(path, body)
        return response.status, json.loads(response.read())

    def upload(self, image: Image.Image) -> str:
        status, found = self.json("images", png(image))
        assert status == 200, found
        return str(found["key"])

    def begin(self, turns: Sequence[dict[str, Any]], **changes: Any) -> Any:
        """Ask, and return the response, whose lines are still to come."""
        asked = {"side": 0, "temperature": 0, "max_new_tokens": 8, "seed": 0, "turns": list(turns), **changes}
        return self.send("ask", json.dumps(asked).encode())

    def ask(self, turns: Sequence[dict[str, Any]], **changes: Any) -> tuple[str, list[dict[str, Any]]]:
        """The whole answer, and the lines that it came in."""
        response = self.begin(turns, **changes)
        lines = [json.loads(line) for line in response]
        assert response.status == 200, lines
        text = ""
        for line in lines:
            text = line.get("whole", text + line.get("text", ""))
        return text, lines
