"""The page's server: who it answers, what it takes, and that its answers are the models' own."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import talk
import tiny
import tiny_families
import vlmtune
from grids import sampled
from vlmtune.cli import chat
from vlmtune.config import compose
from vlmtune.config.schema import Config, home
from vlmtune.data.records import Record, Turn
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.launch.world import ALONE
from vlmtune.models.load import load
from vlmtune.prompt.encode import Encoder
from vlmtune.serve import Server, Side, answering, open_sides, page, uploads

Connect = Callable[[], talk.Client]
FP32 = {"dtype": torch.float32, "compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Path:
    return talk.tuned(tmp_path_factory.mktemp("chat"), checkpoint_of("qwen2_vl"))


def config_of(run: Path, *changes: str) -> Config:
    return compose.overlay(chat.OmegaConf.create({"run": str(run)}), list(changes))


@pytest.fixture(scope="module")
def sides(run: Path) -> list[Side]:
    """The base model and the tuned one."""
    return open_sides([run], [config_of(run)], "auto")


@pytest.fixture(scope="module")
def server(sides: list[Side]) -> Iterator[Server]:
    with talk.served(sides) as server:
        yield server


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    """Opens connections to the server, and closes them at the end."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(talk.Client(server))


@pytest.fixture
def client(connect: Connect) -> talk.Client:
    return connect()


# ---------------------------------------------------------------- who is answered


def test_the_page_is_one_file_that_may_load_nothing_else(client: talk.Client) -> None:
    response = client.send("")
    text, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert response.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{name} {page.source_hash(own)}" in policy
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text) == []
    assert {"no-store", "nosniff", "no-referrer"} <= set(response.headers.values())


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({}, None, 200),
        ({"Host": "localhost:1234"}, None, 200),  # a forwarded port
        ({"Host": "127.0.0.1:1234", "Origin": "http://127.0.0.1:1234"}, None, 200),
        ({}, "", 403),
        ({}, "guess", 403),
        ({"Host": "evil.example"}, None, 403),
        ({"Host": "127.0.0.1.evil.example"}, None, 403),
        ({"Host": ""}, None, 403),
        ({"Origin": "https://evil.example"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, None, 403),
    ],
)
def test_only_the_page_itself_with_the_secret_is_answered(
    client: talk.Client, headers: dict[str, str], token: str | None, status: int
) -> None:
    response = client.send("about", token=token, **headers)
    assert response.status == status
    assert (b"sides" in response.read()) == (status == 200)
    assert client.send("images", b"", token=token, **headers).status == (422 if status == 200 else 403)


@pytest.mark.parametrize(("token", "hosts"), [("TOKEN", 0), ("TOKEN", 2), ("TOKEN\u00e9", 1), ("%54OKEN", 1)])
def test_what_no_browser_sends_is_refused(server: Server, token: str, hosts: int) -> None:
    address, host = token.replace("TOKEN", server.token), "Host: 127.0.0.1\r\n"
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(f"GET /{address}/about HTTP/1.1\r\n{host * hosts}\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 403")


def test_each_server_has_a_secret_of_its_own(sides: list[Side]) -> None:
    tokens = set()
    for _ in range(3):
        with Server(sides) as server:
            tokens.add(server.token)
            assert server.server_address[0] == "127.0.0.1"
    assert len(tokens) == 3
    assert min(map(len, tokens)) >= 32


def test_a_port_in_use_is_a_users_mistake(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"port=\d+: .* in use; port=0 chooses a free one"):
        Server(server.sides, server.server_address[1])


# ---------------------------------------------------------------- images


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 10 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_an_image_is_held_and_shown_upright(client: talk.Client) -> None:
    picture = Image.new("RGB", (30, 20), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    file = talk.io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    status, found = client.json("images", file.getvalue())
    assert (status, found["width"], found["height"]) == (200, 20, 30)
    response = client.send(f"images/{found['key']}")
    preview = Image.open(talk.io.BytesIO(response.read()))
    assert (response.headers["Content-Type"], preview.format, preview.size) == ("image/jpeg", "JPEG", (20, 30))
    assert client.json("images", file.getvalue())[1]["key"] == found["key"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty image: it has 0 bytes"),
        (b"not an image", "not an image: save it as PNG or JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (talk.png(tiny.image())[:-40], "damaged image: "),
        (bomb(), "too many pixels: it has far more, above data.max_image_pixels=100000000"),
    ],
)
def test_what_is_no_image_is_refused_in_words(client: talk.Client, content: bytes, said: str) -> None:
    status, found = client.json("images", content)
    assert status == 422
    assert found["error"].startswith(said)
    assert client.json("about")[0] == 200  # on the same connection


def test_what_is_too_large_is_not_read_into_memory(
    client: talk.Client, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
    monkeypatch.setattr("vlmtune.serve.uploads.Uploads.add", lambda *_: pytest.fail("was read"))
    status, found = client.json("images", bytes(5_000_000))
    assert (status, found["error"]) == (413, "the image file has 4.8 MiB, above 1 KiB")
    status, found = connect().json("ask", bytes(2**20 + 1))
    assert (status, found["error"]) == (413, "the conversation has 1.0 MiB, above 1.0 MiB")


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: -1", "Content-Length: 1e3", "X: y"])
def test_a_request_that_does_not_say_its_length_is_refused(server: Server, length: str) -> None:
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(f"POST /{server.token}/images HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 411")


def test_the_oldest_images_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [talk.png(tiny.image(seed=seed)) for seed in range(3)]
    monkeypatch.setattr(uploads, "HELD_BYTES", len(files[0]) + len(files[2]) + 100)
    held = uploads.Uploads(10_000)
    first, second = held.add(files[0]), held.add(files[1])
    assert held.add(files[0]) is first  # used again: now the newest
    held.add(files[2])
    assert held.of(first.key).content == files[0]
    with pytest.raises(Exception, match="no longer held; add it again"):
        held.of(second.key)


# ---------------------------------------------------------------- answers


def test_an_answer_comes_piece_by_piece_and_is_that_of_predict(
    client: talk.Client, run: Path, sides: list[Side]
) -> None:
    picture = tiny.image(seed=5)
    asked = [{"question": "What color is it?", "images": [client.upload(picture)]}]
    frame = pd.DataFrame({"image_path": [picture], "question": ["What color is it?"]})
    wanted = vlmtune.load(run).predict(frame)["answer_predictions"][0]
    answer, lines = client.ask(asked, side=1)
    assert answer == wanted
    assert len([line for line in lines if "text" in line]) > 2
    assert lines[-1]["done"]["tokens"] == 8
    assert lines[-1]["done"]["cut"]
    assert [side.name for side in sides] == ["tuned, before training", "tuned"]


def test_the_base_answers_as_the_model_does_that_was_never_trained(
    client: talk.Client, run: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    picture = tiny.image(seed=5)
    asked = [{"question": "What color is it?", "images": [client.upload(picture)]}]
    config = config_of(run)
    model, processor = load(config.model, config.quantization, device=torch.device("cpu"), **FP32)
    row = tiny.record("What color is it?", None, [picture])
    arguments: dict[str, Any] = {"batch_size": 1, "autocast": torch.enable_grad}
    [wanted] = generate(model, Encoder(processor), [row], config.generation, **arguments)
    answers = [client.ask(asked, side=side)[0] for side in (0, 1, 0, 1)]
    assert answers[0] == answers[2] == wanted
    assert answers[1] == answers[3] != wanted


def test_earlier_turns_and_later_images_reach_the_model(client: talk.Client, sides: list[Side]) -> None:
    pictures = [tiny.image(seed=6), tiny.image(seed=7)]
    keys = [client.upload(picture) for picture in pictures]
    first = {"question": "What color?", "images": keys[:1], "answer": "red"}
    answer, _ = client.ask([first, {"question": "And this one?", "images": keys[1:]}])
    turns = (Turn("What color?", ("red",), (0,)), Turn("And this one?", (), (0,)))
    record = Record(turns, tuple(pictures))
    base = sides[0]
    arguments: dict[str, Any] = {"batch_size": 1, "autocast": base.at_work}
    [wanted] = generate(base.model, base.encoder, [record], base.config.generation, **arguments)
    assert answer == wanted
    alone, _ = client.ask([{"question": "And this one?", "images": keys[1:]}])
    assert answer != alone


def test_a_seed_draws_the_same_answer_again(client: talk.Client) -> None:
    asked = [{"question": "What color?", "images": [client.upload(tiny.image())]}]
    drawn = [client.ask(asked, temperature=1.5, seed=seed)[0] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
QUICK = ("llava", "idefics", "paligemma2")


@pytest.mark.parametrize("family", sampled(FAMILIES, QUICK))
def test_every_family_streams_what_it_generates(family: str, model_of: Any, encoder_of: Any) -> None:
    encoder, config = encoder_of(family), Config()
    config.generation.max_new_tokens = 6
    side = Side(family, model_of(family), encoder, session.engine(config, trains=False), config)
    row = tiny.record("What color?", None)
    texts: list[str] = []
    done = answering.stream(side, row, config.generation, 0, texts.append, lambda: None)
    arguments: dict[str, Any] = {"batch_size": 1, "autocast": torch.enable_grad}
    assert [done.text] == generate(side.model, encoder, [row], config.generation, **arguments)
    assert texts[-1:] == [done.text] * bool(done.text)
    assert (side.refuses_turns is not None) == (family == "paligemma2")


# ---------------------------------------------------------------- what is refused


ONE = [{"question": "What color?"}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the request is not JSON"),
        (b"[" * 100_000, "the request is not JSON"),
        (b"[]", "the request is not a JSON object"),
        ({"side": 2}, "side: must be a whole number from 0 to 1"),
        ({"side": True}, "side: must be"),
        ({"side": -1}, "side: must be"),
        ({"temperature": -1}, "temperature: must be a number from 0 to 10"),
        ({"temperature": float("nan")}, "temperature: must be a number"),
        ({"temperature": "1"}, "temperature: must be a number"),
        ({"max_new_tokens": 0}, "max tokens: must be a whole number from 1 to 4096"),
        ({"max_new_tokens": 10**9}, "max tokens: must be"),
        ({"seed": 2**32}, "seed: must be"),
        ({"turns": []}, "turns: must be a list"),
        ({"turns": ["What?"]}, "turns: must be a list of objects"),
        ({"turns": [{"question": 1}]}, "question: must be a text"),
        ({"turns": [{"question": ""}]}, "ask something, or add an image"),
        ({"turns": [{"question": "a" * 20_001}]}, "the question has 20001 characters, above 20000"),
        ({"turns": [{"question": "\ud83d"}]}, "question: has half of a character"),
        ({"turns": [{"question": "a", "images": ["f" * 32]}]}, "this image is no longer held; add it again"),
        ({"turns": [{"question": "a", "images": "f"}]}, "images: must be a list of keys"),
        ({"turns": [{"question": "a", "answer": "b"}] * 101}, "the conversation has 101 questions, above 100"),
        ({"turns": [{"question": "a", "images": ["f"] * 17}]}, "the conversation has 17 images, above 16"),
    ],
)
def test_a_malformed_question_is_refused_in_words(client: talk.Client, body: Any, said: str) -> None:
    if isinstance(body, dict):
        body = json.dumps({"side": 0, "temperature": 0, "max_new_tokens": 8, "seed": 0, "turns": ONE} | body).encode()
    status, found = client.json("ask", body)
    assert status == 422
    assert found["error"].startswith(said)


def test_a_conversation_beyond_the_context_is_refused_with_its_length(client: talk.Client) -> None:
    _, lines = client.ask([{"question": "a b " * 4000}])
    assert re.match(
        r"the conversation has \d+ tokens and its answer may have 8; the model takes 4096", lines[-1]["error"]
    )


def test_an_image_that_the_processor_refuses_costs_that_answer_alone(client: talk.Client) -> None:
    thin = client.upload(Image.new("RGB", (600, 2)))
    _, lines = client.ask([{"question": "What?", "images": [thin]}])
    assert "the model's processor refuses the image" in lines[-1]["error"]
    assert "done" in client.ask(ONE)[1][-1]


def test_an_error_of_the_program_is_said_on_the_page_and_shown_in_the_terminal(
    client: talk.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a shape")

    with monkeypatch.context() as patch:
        patch.setattr(type(client.server.sides[0].model), "generate", broken)
        [line] = client.ask(ONE)[1]
    assert line["error"] == "this answer failed, and the terminal shows where: ValueError: a shape"
    assert "an answer failed" in caplog.text
    assert "done" in client.ask(ONE)[1][-1]


# ---------------------------------------------------------------- one after the other, and ending


def test_a_closed_connection_ends_its_answer_and_lets_the_next_one_begin(server: Server, connect: Connect) -> None:
    first, second = connect(), connect()
    response = first.begin(ONE, max_new_tokens=3000)
    assert "text" in json.loads(response.readline())
    waiting = second.begin(ONE)
    assert json.loads(waiting.readline()) == {"waiting": True}
    assert server.generating.locked()
    closed = time.perf_counter()
    response.close()
    first.connection.close()
    assert "done" in [json.loads(line) for line in waiting][-1]
    assert time.perf_counter() - closed < 5  # 3000 tokens take longer


def test_one_that_waits_can_leave_too(connect: Connect) -> None:
    first, second = connect(), connect()
    response = first.begin(ONE, max_new_tokens=3000)
    response.readline()
    waiting = second.begin(ONE)
    waiting.readline()
    waiting.close()
    second.connection.close()
    response.close()
    first.connection.close()
    assert "done" in connect().ask(ONE)[1][-1]


def test_the_end_of_the_server_ends_an_answer(sides: list[Side]) -> None:
    with ExitStack() as stack:
        with talk.served(sides) as server:
            response = stack.enter_context(talk.Client(server)).begin(ONE, max_new_tokens=3000)
            response.readline()
        assert [json.loads(line) for line in response][-1] == {"error": "the server was ended"}


# ---------------------------------------------------------------- which models


def test_several_runs_are_told_apart_by_their_folders(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "tuned"
    other.parent.mkdir()
    other.symlink_to(run)
    configs = [config_of(run), config_of(other)]
    names = [side.name for side in open_sides([run, other], configs, "auto")]
    assert names == [f"{run.parent.name}/tuned", "other/tuned"]


def test_base_off_shows_the_run_alone_and_merges_its_adapter(run: Path) -> None:
    [side] = open_sides([run], [config_of(run)], "off")
    assert not hasattr(side.model, "peft_config")


def test_a_run_without_a_model_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="has not saved a model"):
        open_sides([tmp_path], [config_of(tmp_path)], "auto")


@pytest.mark.slow
def test_an_adapter_that_changes_the_base_itself_is_shown_without_it(
    tmp_path: Path, checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = talk.tuned(tmp_path, checkpoint_of("qwen2_vl"), "adapter=pissa")
    [side] = open_sides([run], [config_of(run)], "auto")
    assert side.name == "tuned"
    assert "this adapter changes the base model's own weights" in caplog.text


@pytest.mark.slow
def test_a_whole_model_is_shown_alone_or_opened_twice(
    tmp_path: Path, checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = talk.tuned(tmp_path, checkpoint_of("qwen2_vl"), "adapter=none")
    with caplog.at_level(logging.INFO, "vlmtune"):
        assert [side.name for side in open_sides([run], [config_of(run)], "auto")] == ["tuned"]
    assert "base=on opens the model before training too" in caplog.text
    base, own = open_sides([run], [config_of(run)], "on")
    assert base.model is not own.model
    with talk.served([base, own]) as server, talk.Client(server) as client:
        assert client.ask(ONE, side=0)[0] != client.ask(ONE, side=1)[0]


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no run is named"),
        (["run=RUN", "runs=[RUN,RUN,RUN,RUN]"], "5 runs are more than a page shows, 4"),
        (["run=RUN", "port=70000"], "port=70000: must be at least 0 and at most 65535"),
        (["run=RUN", "base=both"], "base=both: "),
        (["run=RUN", "prot=1"], "prot: no such key"),
        (["run=RUN", "optimizer.name=sgd"], "has no effect on a finished run"),
        (["run=nowhere"], "nowhere: is not a run folder"),
    ],
)
def test_a_mistake_is_found_before_a_model_is_opened(run: Path, words: list[str], said: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        chat.check([word.replace("RUN", str(run)) for word in words], False, ALONE)
    assert said in str(caught.value)


def test_m_means_nothing_here(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"-m: a page shows several runs at once: .* runs=\[A,B\]"):
        chat.check([f"run={run}"], True, ALONE)


@pytest.mark.parametrize("shared", [False, True])
def test_runs_of_two_precisions_need_one(run: Path, tmp_path: Path, shared: bool) -> None:
    saved = (run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(saved.replace("precision: auto", "precision: fp32"))
    refused = pytest.raises(ConfigError, match="compute in auto and fp32, which one process can't")
    with nullcontext() if shared else refused:
        chat.check([f"runs=[{run},{tmp_path}]", *["trainer.precision=fp32"] * shared], False, ALONE)


@pytest.mark.slow
def test_the_command_prints_an_address_and_ctrl_c_ends_it(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, str(home() / "src" / "chat.py"), f"run={run}", "generation.max_new_tokens=3000"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=tmp_path, env=environment, **pipes) as chatting:
        assert chatting.stdout is not None
        found = None
        while found is None:
            text = chatting.stdout.readline()
            assert text, chatting.stderr
            found = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/", text)
        asked = {"side": 0, "temperature": 0, "max_new_tokens": 3000, "seed": 0, "turns": ONE}
        with closing(HTTPConnection("127.0.0.1", int(found[1]))) as connection:
            connection.request("POST", f"/{found[2]}/ask", json.dumps(asked))
            response = connection.getresponse()
            response.readline()
            chatting.send_signal(signal.SIGINT)
            assert json.loads(response.read().splitlines()[-1]) == {"error": "the server was ended"}
        _, errors = chatting.communicate(timeout=60)
    assert (chatting.returncode, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []
