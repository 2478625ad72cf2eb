"""What is given as a model and is none: one sentence with the cause and the way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import tiny
from vlmtune.config.schema import ModelConfig
from vlmtune.config.together import is_commit
from vlmtune.errors import ModelError
from vlmtune.models.adapters import adapt
from vlmtune.models.explain import check_names
from vlmtune.models.load import load
from vlmtune.models.parts import find_parts
from vlmtune.training.model_folder import save_model


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load(
            ModelConfig(path=str(path)),
            tiny.method({}),
            dtype=torch.float32,
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copied(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, to damage."""
    return Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "llava"))


def test_weights_that_may_run_code(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model-00001-of-00001.bin")
    (copied / "model.safetensors").unlink()
    text = refusal(copied)
    assert "has its weights in pytorch_model-00001-of-00001.bin only" in text
    assert "convert them once: python -c" in text


def test_the_given_conversion_works(copied: Path, tmp_path: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    code = refusal(copied).partition('python -c "')[2].partition('"')[0].replace("'NEW'", repr(str(tmp_path / "new")))
    exec(code)  # the sentence's own line
    assert (tmp_path / "new" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["model", "run"])
def test_an_adapter_is_no_model(model_of: Any, encoder_of: Any, tmp_path: Path, where: str) -> None:
    model = model_of("llava")
    wrapped = adapt(model, tiny.config(None, adapter=tiny.LORA), find_parts(model))
    save_model(wrapped, encoder_of("llava").processor, tmp_path / "model")
    (tmp_path / "config.yaml").write_text("{}")
    text = refusal(tmp_path / "model" if where == "model" else tmp_path)
    base = json.loads((tmp_path / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert f"is an adapter of {base}, not a whole model" in text
    assert f"model.path={base}" in text
    assert f"To train it further: model.path={base} adapter.from={tmp_path}" in text
    assert "To answer with it: vlmtune predict run=" in text


def test_a_run_that_trained_the_whole_model(copied: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    copied.rename(run / "model")
    assert refusal(run) == f"model.path={run}: is the folder of a run; its model is model.path={run}/model"


def test_a_path_from_home(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copied.parent))
    config = ModelConfig(path="~/llava")
    load(config, tiny.method({}), dtype=torch.float32, compute_dtype=torch.float32, device=torch.device("cpu"))
    assert config.path == str(copied)
    assert refusal("~/nowhere") == f"model.path={copied.parent}/nowhere: no such folder"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json holds a list, not an object"),
        ("config.json", "{}", "model_type"),
        ("generation_config.json", "{", "generation_config.json is damaged: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged: "),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "run `git lfs pull`"),
        ("model.safetensors", "12345678", "are cut or damaged; copy them again"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "m-00002-of-00002.safetensors"}}',
            "1 of 1 weight files",
        ),
        ("model.safetensors.index.json", "[1", "index.json: can't be opened: is damaged"),
        ("model_index.json", "{}", "is a diffusers pipeline"),
    ],
)
def test_damaged_and_foreign_files(copied: Path, file: str, content: str, message: str) -> None:
    (copied / file).write_text(content)
    assert message in refusal(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json; give a checkpoint in the hub's layout"),
        ("model.safetensors", "has no weights (*.safetensors)"),
        ("tokenizer.json", "has no tokenizer.json; copy it from the original checkpoint"),
        ("processor_config.json", "has no files of an image processor"),
    ],
)
def test_files_that_are_missing(copied: Path, file: str, message: str) -> None:
    (copied / file).unlink()
    assert message in refusal(copied)


def test_files_in_place_of_a_folder(copied: Path) -> None:
    (copied / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file, which can't be trained" in refusal(copied / "model.gguf")
    assert "is a file; give the folder" in refusal(copied / "config.json")


def test_a_text_model(copied: Path) -> None:
    text = json.loads((copied / "config.json").read_text())["text_config"]
    (copied / "config.json").write_text(json.dumps({**text, "architectures": ["LlamaForCausalLM"]}))
    assert "is of a type that doesn't read images" in refusal(copied)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"adapter_config.json", "adapter_model.safetensors"}, "is an adapter, not a whole model"),
        ({"config.json", "pytorch_model.bin"}, "convert them once"),
        ({"x.gguf"}, "its GGUF files can't be trained"),
    ],
)
def test_the_files_of_a_hub_model_are_looked_at_before_they_are_fetched(names: set[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_names("somebody/some-model", names)
    check_names("somebody/some-model", {"config.json", "model.safetensors", "pytorch_model.bin"})


def test_a_hub_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of the start below: the hub's own library fails to connect, in this process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "is not in the local cache, and the hub can't be reached" in refusal("somebody/some-model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model=qwen2vl_2b"], "hf download Qwen/Qwen2-VL-2B-Instruct` and give the folder: model.path=FOLDER"),
        pytest.param(
            ["model=pico", "data=hub", "data.train=somebody/some-data"],
            "hf download --repo-type dataset somebody/some-data` and give the folder: data.train=FOLDER",
            marks=pytest.mark.slow,  # datasets tries six times
        ),
    ],
    ids=["model", "data"],
)
def test_a_start_that_can_not_reach_the_hub(tmp_path: Path, overrides: list[str], wanted: str) -> None:
    """Nothing is mocked: no cache, not told to be offline, and a hub at an address where nobody listens."""
    root = Path(__file__).parents[1]
    own = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | own
    command = [sys.executable, "src/train.py", *overrides, "tracker=none", f"hydra.run.dir={tmp_path}/run"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    text = " ".join((done.stdout + done.stderr).split())
    assert wanted in text
    assert "the hub can't be reached" in text
    assert "Traceback" not in text
    assert time.monotonic() - start < 120


def test_only_a_full_hash_is_a_commit() -> None:
    assert is_commit("a" * 40)
    assert not [name for name in (None, "main", "v1.0", "a" * 39, "A" * 40) if is_commit(name)]
