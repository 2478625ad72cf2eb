"""What can go wrong on the way to a model says what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

import tiny
from vlmtune.config.schema import Config, ModelConfig
from vlmtune.errors import CheckpointError, ConfigError, ModelError
from vlmtune.models.load import load, load_trained, make_fresh
from vlmtune.network import http
from vlmtune.prompt.hub import hub_options

FP32 = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
REPO = "somebody/some-model"


def opened(path: Path | str, **model: Any) -> tuple[Any, Any]:
    return load(ModelConfig(path=str(path), **model), tiny.method({}), **FP32)


def refusal(path: Path | str, **model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        opened(path, **model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copied(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, to damage."""
    return Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "llava"))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_a_folder_opens_in_the_asked_type(checkpoint_of: Callable[[str], Path], family: str) -> None:
    model, processor = load(
        ModelConfig(path=str(checkpoint_of(family))), tiny.method({}), **{**FP32, "dtype": torch.bfloat16}
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert processor.tokenizer is not None
    assert processor.image_processor is not None


def test_the_asked_attention_is_used(checkpoint_of: Callable[[str], Path]) -> None:
    model, _ = opened(checkpoint_of("llava"), attention="eager")
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- folders


def test_a_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"model.path={tmp_path}/nowhere: no such folder"
    assert refusal("./models/mine") == "model.path=./models/mine: no such folder"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: can't be opened: ")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_folder_without_one_of_its_files(copied: Path, file: str) -> None:
    name = file if (copied / file).exists() else "processor_config.json"
    (copied / name).unlink()
    assert refusal(copied).startswith(f"{copied}: ")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 1000, None], ids=["empty", "short", "noise", "cut"])
def test_damaged_weights(copied: Path, content: bytes | None) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000] if content is None else content)
    assert refusal(copied).startswith(f"{copied}: can't be opened: ")


def test_damaged_config(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    assert refusal(copied).startswith(f"{copied}: can't be opened: ")


def test_missing_weights_are_not_left_random(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "1 weights are missing from its files" in refusal(copied)


def test_weights_of_another_shape(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert refusal(copied).startswith(f"{copied}: ")


def test_a_language_model_is_no_vision_language_model(copied: Path) -> None:
    text = json.loads((copied / "config.json").read_text())["text_config"]
    (copied / "config.json").write_text(json.dumps({**text, "architectures": ["LlamaForCausalLM"]}))
    assert str(copied) in refusal(copied)


# ---------------------------------------------------------------- the hub


def answer(status: int, kind: type[HfHubHTTPError], text: str = "") -> HfHubHTTPError:
    response = http().Response(status, request=http().Request("GET", f"https://huggingface.co/{REPO}"))
    return kind(text or f"{status} Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            answer(403, hub.GatedRepoError),
            r"gated: accept its licence on https://huggingface\.co/.*hf auth login.*HF_TOKEN",
        ),
        (answer(401, hub.RepositoryNotFoundError), "no such model on the hub, or a private one.*hf auth login"),
        (answer(404, hub.RepositoryNotFoundError), "no such model on the hub"),
        (answer(404, hub.RevisionNotFoundError), r"model\.revision=abc: .* has no such revision; see .*/commits"),
        (hub.LocalEntryNotFoundError("not cached"), r"hf download somebody/some-model.*model\.path=FOLDER"),
        (hub.OfflineModeIsEnabled("offline mode is enabled"), "the hub can't be reached"),
        (http().ConnectError("name or service not known"), "the hub can't be reached"),
        (http().ReadTimeout("timed out"), "the hub can't be reached"),
        (answer(500, HfHubHTTPError), f"^{REPO}: can't be opened: 500"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception, wanted: str, wrapped: bool) -> None:
    """transformers wraps some of these in an OSError of its own."""

    def fail(*_: Any, **__: Any) -> Any:
        if wrapped:
            raise OSError("Can't load the configuration.\nSee the cause.") from error
        raise error

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", fail)
    with pytest.raises(ModelError, match=wanted):
        opened(REPO, revision="abc")


@pytest.mark.slow
def test_a_hub_id_without_network(tmp_path: Path) -> None:
    code = (
        "import torch; from vlmtune.config.schema import MethodConfig, ModelConfig\n"
        "from vlmtune.models.load import load\n"
        f"load(ModelConfig(path={REPO!r}), MethodConfig(), dtype=torch.float32, compute_dtype=torch.float32,"
        " device=torch.device('cpu'))"
    )
    source = str(Path(__file__).parents[1] / "src")
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **own})
    assert f"{REPO}: is not in the local cache, and the hub can't be reached" in done.stderr.splitlines()[-1]


def test_a_hub_id_that_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run with HF_HUB_OFFLINE=1: the real path through transformers."""
    assert "is not in the local cache, and the hub can't be reached" in refusal(REPO)


def test_remote_code_is_off_by_default_and_revisions_are_for_the_hub(tmp_path: Path) -> None:
    assert hub_options(ModelConfig(path=REPO)) == {"trust_remote_code": False, "revision": "main"}
    assert hub_options(ModelConfig(path=REPO, revision="abc"))["revision"] == "abc"
    assert hub_options(ModelConfig(path=str(tmp_path), revision="abc")) == {"trust_remote_code": False}
    assert hub_options(ModelConfig(path=REPO, trust_remote_code=True))["trust_remote_code"]


def test_remote_code_in_a_folder_does_not_run(copied: Path) -> None:
    settings = json.loads((copied / "config.json").read_text())
    auto = {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.Mine"}
    (copied / "config.json").write_text(json.dumps({**settings, "model_type": "mine", "auto_map": auto}))
    (copied / "mine.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in refusal(copied)


# ---------------------------------------------------------------- fresh and trained models


def test_a_fresh_model_is_written_by_the_named_function(tmp_path: Path) -> None:
    config = ModelConfig(fresh="vlmtune.models.pico.nothing")
    with pytest.raises(ConfigError, match=r"model\.fresh=vlmtune\.models\.pico\.nothing"):
        make_fresh(config, tmp_path, 0, None)
    with pytest.raises(ConfigError, match=r"model\.fresh=nowhere\.build"):
        make_fresh(ModelConfig(fresh="nowhere.build"), tmp_path, 0, None)


def test_a_run_without_a_saved_model(tmp_path: Path) -> None:
    config: Config = tiny.config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has not saved a model; its result\.json says why"):
        load_trained(tmp_path, config, **FP32)
