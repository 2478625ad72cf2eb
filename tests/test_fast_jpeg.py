"""data.fast_jpeg changes pixels a little: the log says so where it acts, and a run's answers see what it trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tiny
import vlmtune
from grids import thinned
from vlmtune.config.schema import ModelConfig
from vlmtune.prompt import image_inputs
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.processors import load_processor

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks for it


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two JPEG files far larger than the tiny model sees."""
    paths = [tmp_path / f"{number}.jpg" for number in range(2)]
    for number, path in enumerate(paths):
        tiny.image(1200, 900, number).save(path, quality=90)
    return paths


def pixels(encoder: Encoder, *paths: Path) -> torch.Tensor:
    rows = [tiny.record(images=[path], group=path) for path in paths]  # type: ignore[list-item]
    values: torch.Tensor = encoder.encode(rows, answered=False).image_inputs["pixel_values"]
    return values


def encoder(folder: Path, **options: Any) -> Encoder:
    return Encoder(load_processor(ModelConfig(path=str(folder))), **options)


def test_the_log_says_once_that_images_are_reduced(
    checkpoint_of: Callable[[str], Path], photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint_of("qwen2_vl")
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        whole = pixels(encoder(folder, fast_jpeg=False), *photos)
        assert not caplog.messages
        reducing = encoder(folder)
        reduced = pixels(reducing, *photos)
        pixels(reducing, *photos)
    [message] = caplog.messages
    assert "data.fast_jpeg" in message
    assert "0.jpg, 1200 x 900 at 1/" in message
    assert not torch.equal(reduced, whole)
    assert (reduced - whole).abs().mean() < 0.2  # the same picture


def test_small_images_and_other_formats_are_whole_and_nothing_is_said(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.image(100, 100).save(tmp_path / "small.jpg")
    tiny.image(1200, 900).save(tmp_path / "large.png")
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        pixels(encoder(checkpoint_of("qwen2_vl")), tmp_path / "small.jpg", tmp_path / "large.png")
    assert not caplog.messages


def test_an_image_alone_and_among_others_is_the_same(checkpoint_of: Callable[[str], Path], photos: list[Path]) -> None:
    reducing = encoder(checkpoint_of("qwen2_vl"))
    assert torch.equal(pixels(reducing, *photos), torch.cat([pixels(reducing, path) for path in photos]))


@pytest.mark.parametrize("fast", thinned([True, False], 1))
def test_a_run_answers_from_the_pixels_that_it_trained_on(
    checkpoint_of: Callable[[str], Path],
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
) -> None:
    """Training, evaluation and the loaded model reduce alike, by the run's own value."""
    table = tmp_path / "rows.csv"
    table.write_text("image_path,question,answer\n0.jpg,a?,x\n1.jpg,b?,y\n")
    used: list[bool] = []
    plain = image_inputs.open_image

    def noting(*given: Any) -> Any:
        used.append(given[2] is not None)
        return plain(*given)

    monkeypatch.setattr(image_inputs, "open_image", noting)
    result = vlmtune.train(
        [
            "model=auto",
            f"model.path={checkpoint_of('qwen2_vl')}",
            "data=csv",
            f"data.train={table}",
            f"data.validation={table}",
            f"data.fast_jpeg={str(fast).lower()}",
            "tracker=none",
            "trainer.max_steps=1",
            "trainer.batch_size=2",
            "generation.max_new_tokens=2",
            f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )
    predictor = vlmtune.load(result["folder"])
    trained = len(used)
    predictor.predict(pd.DataFrame({"image_path": [str(photos[0])], "question": ["a?"]}))
    assert len(used) > trained > 0
    assert set(used) == {fast}
    said = "data.fast_jpeg: JPEG" in (Path(result["folder"]) / "train.log").read_text()
    assert said == fast
