"""Strange content in a run folder is one sentence that names the file, wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import vlmtune
from vlmtune import durable
from vlmtune.config import compose
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.launch import lock
from vlmtune.models.load import load_trained
from vlmtune.record import guard
from vlmtune.training.model_folder import save_model

CONFIGS: dict[str, bytes] = {
    "nothing": b"",
    "{}": b"{}",
    "a list": b"- a\n- b\n",
    "a word": b"hello",
    "no text": b"\xff\xfe\x00\x01",
    "no YAML": b"model: [unclosed\n  - : }",
    "a tab": b"model:\n\tname: x",
    "a group that is a word": b"trainer: fast\n",
    "a key of another version": b"trainer:\n  warp_speed: 9\n",
    "a group of another version": b"teleport:\n  to: mars\n",
    "a wrong type": b"trainer:\n  batch_size: many\n",
    "a value out of bounds": b"trainer:\n  batch_size: 0\n",
    "a key twice": b"trainer:\n  seed: 1\n  seed: 2\n",
    "a method of another version": b"adapter:\n  method: telepathy\n",
    "a key that is a number": b"1: 2\n",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_strange_config_is_one_error_wherever_it_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: vlmtune.train([f"resume={tmp_path}"]),
        lambda: vlmtune.load(tmp_path),
        lambda: compose.overlay(compose.compose("predict", [f"++run={tmp_path}"]), [f"run={tmp_path}"]),
        lambda: compose.overlay(compose.compose("evaluate", [f"++run={tmp_path}"]), [f"run={tmp_path}"]),
    )
    for way in ways if content in (b"", b"hello") else ways[:2]:  # the scripts read it as vlmtune.load does
        with pytest.raises(CheckpointError) as caught:
            way()
        assert all(problem.startswith(f"{tmp_path / 'config.yaml'}: ") for problem in caught.value.problems)


def test_a_config_that_is_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(CheckpointError, match="is not a run folder"):
        vlmtune.load(tmp_path)


RESULTS: dict[str, bytes] = {
    "nothing": b"",
    "{}": b"{}",
    "a list": b"[]",
    "half": b'{"status": "compl',
    "no text": b"\xff\xfe",
    "null": b"null",
    "a number for the status": b'{"status": 3}',
}


@pytest.mark.parametrize("content", RESULTS.values(), ids=RESULTS)
def test_a_strange_result_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"result\.json: is damaged: [^;]*; delete it or put the right one back"):
        guard.check_free(tmp_path, tiny.config(None))


def test_a_folder_with_a_finished_run_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    (tmp_path / "result.json").write_text(json.dumps({"status": "completed"}))
    with pytest.raises(ConfigError, match="holds a run already"):
        guard.check_free(tmp_path, tiny.config(None))


def test_a_start_that_was_interrupted_before_it_saved_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    (tmp_path / "result.json").write_text(json.dumps({"status": "interrupted"}))
    guard.check_free(tmp_path, tiny.config(None))


@pytest.mark.parametrize("kept", ["checkpoints/step_000002", "checkpoints/.step_000002.old", "model", ".model.old"])
def test_what_a_failed_or_killed_run_has_saved_is_not_written_over(tmp_path: Path, kept: str) -> None:
    """Under a name that a kill between two renames leaves as well."""
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    (tmp_path / kept).mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        guard.check_free(tmp_path, tiny.config(None))


@pytest.mark.parametrize(
    "left", ["checkpoints", "checkpoints/.step_000002.partial", "checkpoints/.step_000002.deleted"]
)
def test_a_run_that_saved_nothing_is_no_obstacle(tmp_path: Path, left: str) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a run already"):  # for all we know: nothing says how it ended
        guard.check_free(tmp_path, tiny.config(None))
    (tmp_path / lock.NAME).touch()  # a run was started in it, and does not run any more
    guard.check_free(tmp_path, tiny.config(None))


# ---------------------------------------------------------------- the saved model


@pytest.fixture
def saved(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A run folder with a saved adapter, and a function that opens it."""
    import torch

    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA)
    run = tiny.assemble(config, tiny.records(2))
    save_model(run.model, run.processor, tmp_path / "model")
    types = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    return tmp_path, lambda: load_trained(tmp_path, config, **types)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_flipped_bit_in_a_saved_model_is_found(saved: tuple[Path, Callable[[], Any]], name: str) -> None:
    folder, opened = saved
    opened()
    file = folder / "model" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not as it was written"):
        opened()


def test_a_saved_model_opens_under_the_name_that_a_kill_left_it(saved: tuple[Path, Callable[[], Any]]) -> None:
    folder, opened = saved
    (folder / "model").rename(folder / ".model.partial")
    opened()
    (folder / ".model.partial" / durable.SUMS).unlink()
    with pytest.raises(CheckpointError, match="has not saved a model"):
        opened()
