"""What a run leaves in its process: no model, no handler, no changed state, and none of its peak memory."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.utils import logging as transformers_logging

import tiny
import vlmtune
from grids import thinned
from vlmtune import display
from vlmtune.models import load
from vlmtune.record import environment

Overrides = Callable[..., list[str]]


def overrides_in(folder: Path, checkpoint: Path) -> Overrides:
    table = tiny.write_csv(folder, [(f"number {i}?", ("red", "blue")[i % 2]) for i in range(12)], per_image=3)

    def make(*more: str, name: str = "run") -> list[str]:
        return [
            "model=auto",
            f"model.path={checkpoint}",
            "data=csv",
            f"data.train={table}",
            "tracker=none",
            "trainer.max_steps=2",
            "trainer.batch_size=4",
            "generation.max_new_tokens=2",
            f"hydra.run.dir={folder / name}",
            *more,
        ]

    return make


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Overrides:
    return overrides_in(tmp_path, checkpoint_of("qwen2_vl"))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """Weak references to every model that a run opens; cycles are not collected meanwhile."""
    found: list[weakref.ref[Any]] = []
    opened = load.load

    def noting(*arguments: Any, **options: Any) -> Any:
        model, processor = opened(*arguments, **options)
        found.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr(load, "load", noting)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize("more", thinned(["adapter=lora", "adapter=none", "data.validation_fraction=0.3"], 1))
def test_the_model_of_a_run_is_gone_when_the_run_is(overrides: Overrides, models: list[Any], more: str) -> None:
    """The features of frozen towers stay for the next trial, and hold no model."""
    vlmtune.train(overrides(more, name="one"))
    vlmtune.train(overrides(more, name="two"))
    assert [model() for model in models] == [None, None]


def state() -> dict[str, Any]:
    """What a caller may have set, in a form that can be compared."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "warnings": list(warnings.filters),
        "verbosity": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "loggers": [
            (logging.getLogger(name).level, logging.getLogger(name).propagate, list(logging.getLogger(name).handlers))
            for name in ("vlmtune", "bitsandbytes", "hydra")
        ],
        "environment": dict(os.environ),
    }


def test_training_and_answering_leave_the_callers_state_alone(overrides: Overrides, tmp_path: Path) -> None:
    torch.manual_seed(7)
    logging.getLogger("hydra").setLevel(logging.NOTSET)  # as a process has it that composed nothing yet
    before = state()
    vlmtune.train(overrides())
    assert state() == before
    predictor = vlmtune.load(tmp_path / "run")
    assert state() == before
    predictor.predict(pd.DataFrame({"image_path": [str(tmp_path / "0.png")], "question": ["number 1?"]}))
    assert state() == before


@pytest.mark.slow
def test_sampling_goes_on_in_the_predictors_own_random_numbers(overrides: Overrides, tmp_path: Path) -> None:
    """Two calls draw two answers, and a predictor that is opened again draws the same two."""
    vlmtune.train(overrides())
    frame = pd.DataFrame({"image_path": [str(tmp_path / "0.png")] * 4, "question": ["number 1?"] * 4})
    hot = ["generation.temperature=5", "generation.max_new_tokens=8"]
    drawn = []
    for _ in range(2):
        predictor = vlmtune.load(tmp_path / "run", overrides=hot)
        drawn.append([predictor.predict(frame)["answer_predictions"].tolist() for _ in range(2)])
        torch.rand(3)  # the caller's own
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def first_loss(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text().split('"train/loss": ')[1][:8]


@pytest.fixture(scope="module")
def outside(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first loss of a run outside all settings."""
    folder = tmp_path_factory.mktemp("outside")
    vlmtune.train(overrides_in(folder, checkpoint_of("qwen2_vl"))(name="plain"))
    return first_loss(folder / "plain")


@pytest.mark.xdist_group("caller's settings")
@pytest.mark.parametrize("kind", thinned(["float64", "no_grad", "inference", "meta", "autocast"], 2))
def test_a_run_inside_the_callers_torch_settings_is_the_run_outside(
    overrides: Overrides, tmp_path: Path, outside: str, kind: str
) -> None:
    settings: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "float64": pytest.MonkeyPatch.context,
    }
    try:
        with settings[kind]():
            if kind == "float64":
                torch.set_default_dtype(torch.float64)
            assert vlmtune.train(overrides(name="inside"))["status"] == "completed"
            assert torch.get_default_dtype() == (torch.float64 if kind == "float64" else torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first_loss(tmp_path / "inside") == outside


def test_peak_memory_is_that_of_the_present_run() -> None:
    """`ru_maxrss` never falls, so the second trial of a sweep would have the first one's peak."""
    environment.PEAK.start()
    large = b"x" * 300_000_000
    first = environment.memory()["peak_rss_bytes"]
    del large
    environment.PEAK.start()
    assert environment.memory()["peak_rss_bytes"] < first - 200_000_000


def test_without_the_kernels_mark_the_largest_value_seen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = environment.Peak()
    values = iter([5, 9, 7])
    monkeypatch.setattr(environment, "_status", lambda name: next(values) if name == "VmRSS" else 0)
    assert [peak.resident() for _ in range(3)] == [5, 9, 9]


@pytest.mark.parametrize("kept", [True, False])
def test_a_log_leaves_the_logger_as_it_was(tmp_path: Path, kept: bool) -> None:
    """predict.py and evaluate.py log without a folder; what logs after them in the same process is heard."""
    log = logging.getLogger("vlmtune")
    before = (log.level, log.propagate, list(log.handlers))
    with display.logging_to(tmp_path if kept else None):
        assert not log.propagate
    assert (log.level, log.propagate, list(log.handlers)) == before
