"""model/README.md: it says what the run knows, shows no path of this machine, and its code works."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from grids import thinned
from vlmtune import durable
from vlmtune.config.schema import Config
from vlmtune.record import card
from vlmtune.training.model_folder import save_model

RESULT: dict[str, Any] = {
    "status": "completed",
    "steps": 402,
    "examples": 38575,
    "metrics": {
        "baseline/exact_match": 0.58,
        "eval/exact_match": 0.9985,
        "eval/loss": 0.0037,
        "test/exact_match": None,
    },
}
ENVIRONMENT = {
    "git": {"sha": "0123456789abcdef", "diff": ""},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "pillow": "13.0.0"},
    "data_fingerprint": "47287859",
    "image_fingerprint": None,
}


def run_folder(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def written(folder: Path, config: Config, result: dict[str, Any] = RESULT, **rows: int) -> str:
    return card.write(run_folder(folder), config, result, rows or {"train": 38575, "validation": 2000}).read_text()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A 4-bit LoRA run on a checkpoint of the hub, of which nothing is read here."""
    monkeypatch.setattr("vlmtune.prompt.hub.is_original_internvl2", lambda config: False)
    config = tiny.config("Qwen/Qwen2-VL-7B-Instruct", adapter=tiny.LORA, quantization=tiny.QUANTIZED["nf4"])
    config.model.name, config.model.revision = "qwen2vl_7b", "eed1309"
    return config


def test_it_says_what_was_trained_on_what_and_how_well(hub: Config, tmp_path: Path) -> None:
    hub.data = replace(hub.data, train=["/home/someone/private/vqa.csv", "more.jsonl"], validation="/data/val.csv")
    text = written(tmp_path, hub)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2-VL-7B-Instruct"
    assert front["library_name"] == "peft"
    assert "license" not in front
    for expected in (
        "`Qwen/Qwen2-VL-7B-Instruct` at revision `eed1309`",
        "- adapter: `lora`",
        '- parts: `["language"]`',
        '"bnb_4bit_quant_type": "nf4"',
        "- train: 38,575 rows, `vqa.csv`, `more.jsonl`",
        "- validation: 2,000 rows, `val.csv`",
        "- fingerprint of the texts: `47287859`",
        "- optimizer steps: 402",
        "- rows seen: 38,575 (95.96 a step)",
        "| exact_match | 0.5800 | 0.9985 | - |",
        "on the 2,000 validation rows.",
        'revision="eed1309"',
        "(commit 0123456789), torch 2.13.0, transformers 5.23.0",
    ):
        assert expected in text


@pytest.mark.parametrize("adapter", [tiny.LORA, None])
def test_it_shows_no_absolute_path(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    own = None if adapter is None else adapter | {"modules_to_save": [str(tmp_path / "weights")]}
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=own)
    config.data = replace(config.data, train=str(tmp_path / "rows.csv"), image_root=str(tmp_path), validation="~/v.csv")
    text = written(tmp_path / "run", config)
    assert "rows.csv" in text
    assert not re.findall(r"(?<![\w.])[/~]\w+/", text)
    assert str(tmp_path) not in text


def test_a_run_without_evaluation_and_one_that_was_interrupted(hub: Config, tmp_path: Path) -> None:
    text = written(
        tmp_path, hub, {"status": "interrupted", "steps": 0, "examples": 0, "metrics": {}}, train=sys.maxsize
    )
    assert "its status is `interrupted`" in text
    assert "No rows were evaluated." in text
    assert "- train: rows not counted" in text
    assert "More Information Needed" not in text


def test_an_original_internvl2_is_not_said_to_open_elsewhere(
    hub: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmtune.prompt.hub.is_original_internvl2", lambda config: True)
    assert "from_pretrained" not in written(tmp_path, hub)


@pytest.mark.parametrize("adapter", thinned([tiny.LORA, None], 2))
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_its_code_answers_a_question(
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    adapter: dict[str, Any] | None,
) -> None:
    config = tiny.config(checkpoint_of(name), adapter=adapter)
    run = tiny.assemble(config, tiny.records(2))
    save_model(run.model, run.processor, tmp_path / "model")
    assert not (tmp_path / "model" / "README.md").exists()  # PEFT's template, which nobody filled in
    text = written(tmp_path, config, validation=2)
    durable.verify(tmp_path / "model")  # the card is not among the checksums
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {"image": tiny.image(), "question": "What color?"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1:]:
        exec(compile(block, "card", "exec"), names)
    assert isinstance(names["answer"], str)


def test_a_card_says_that_a_video_half_needs_torchvision(hub: Config, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for saved, said in ({}, False), ({"video_processor": {}}, True):
        (tmp_path / "model" / "processor_config.json").write_text(json.dumps(saved))
        text = written(tmp_path, hub)
        assert "processor = AutoProcessor.from_pretrained(folder)" in text
        assert ("needs torchvision" in text) == said
