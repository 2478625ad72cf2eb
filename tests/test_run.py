"""Whole runs on a tiny checkpoint: what lands in the folder, resuming, choosing, and using the result."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file

import tiny
import vlmtune
import wandb_offline
from grids import sampled, thinned
from vlmtune.config import compose
from vlmtune.evaluation import generate
from vlmtune.evaluation.branches import greedy_branches
from vlmtune.predict.files import predict_file
from vlmtune.predict.scores import evaluate_run
from vlmtune.proof import probes

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks for it

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file with 24 rows about 8 images."""
    rows = [(f"what is number {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(24)]
    return tiny.write_csv(tmp_path_factory.mktemp("table"), rows, per_image=3)


def overrides_in(folder: Path, checkpoint: Path, table: Path) -> Overrides:
    """The command line of a short run into `folder/NAME`."""

    def make(*more: str, name: str = "run", steps: int = 4) -> list[str]:
        return [
            "model=auto",
            f"model.path={checkpoint}",
            "data=csv",
            f"data.train={table}",
            f"data.validation={table}",
            "data.max_eval_rows=6",
            "tracker=none",
            f"trainer.max_steps={steps}",
            "trainer.batch_size=4",
            "trainer.learning_rate=1e-2",
            "generation.max_new_tokens=4",
            f"hydra.run.dir={folder / name}",
            *more,
        ]

    return make


@pytest.fixture
def overrides(checkpoint_of: Callable[[str], Path], table: Path, tmp_path: Path) -> Overrides:
    return overrides_in(tmp_path, checkpoint_of("qwen2_vl"), table)


def weights(folder: Path | str) -> dict[str, Any]:
    return load_file(next(Path(folder).glob("model/*.safetensors")))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(overrides: Overrides, tmp_path: Path, table: Path) -> None:
    result = vlmtune.train(overrides("trainer.save_every=2"))
    folder = Path(result["folder"])
    assert folder == tmp_path / "run"
    saved = json.loads((folder / "result.json").read_text())
    assert saved["status"] == "completed"
    assert (saved["steps"], saved["examples"], saved["error"]) == (4, 16, None)
    assert saved["objective"] == saved["metrics"]["eval/exact_match"]
    assert {"eval/loss", "baseline/exact_match", "baseline/loss"} <= saved["metrics"].keys()
    assert saved["metrics"]["eval/loss"] < saved["metrics"]["baseline/loss"]
    assert saved["speed"]["examples_per_second"] > 0
    assert saved["speed"]["tokens_per_second"] > saved["speed"]["examples_per_second"]
    assert saved["memory"]["peak_rss_bytes"] > 1e7
    logged = rows_of(folder)
    assert {"train/loss", "train/learning_rate", "time/step_seconds"} <= logged[-2].keys() | logged[2].keys()
    environment = json.loads((folder / "environment.json").read_text())
    assert {"git", "versions", "devices", "seed", "data_fingerprint"} <= environment.keys()
    written = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    asked = pd.read_csv(table, dtype=str)[:6]
    assert [*asked.columns, "answer_predictions", "score"] == list(written.columns)
    assert written["question"].tolist() == asked["question"].tolist()
    assert "<html" in (folder / "report.html").read_text()
    assert "on the 6 validation rows" in (folder / "model" / "README.md").read_text()
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000004"]
    assert not (folder / "quarantine.csv").exists()
    assert not [p for p in folder.rglob("*") if ".partial" in p.name]


def by_script_of(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "src/predict.py", *words], capture_output=True, text=True, check=True)
    assert "1 rows failed" in done.stdout


def in_process(words: list[str]) -> None:
    """What the script does, without seconds of imports."""
    composed = compose.compose("predict", compose.normalise(words)[0])
    assert predict_file(composed.run, compose.overlay(composed, words), composed.output) == 1


@pytest.mark.parametrize("kind", sampled(["lora", "nf4", "full"], ["nf4"]))
def test_predict_script_and_api_agree(overrides: Overrides, tmp_path: Path, table: Path, kind: str) -> None:
    """The same answers, in row order, for an adapter, an adapter over 4-bit weights and a whole model."""
    extra = {"lora": [], "nf4": ["quantization=nf4"], "full": ["adapter=none"]}[kind]
    predict = {"lora": by_script_of, "nf4": in_process, "full": in_process}[kind]
    vlmtune.train(overrides(*extra, "trainer.eval_baseline=false"))
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    frame.loc[3, "image_path"] = "gone.png"
    mixed = table.parent / f"mixed_{kind}.csv"
    frame.to_csv(mixed, index=False)
    output = tmp_path / "answers.csv"
    predict([f"run={tmp_path / 'run'}", f"data.test={mixed}", f"output={output}"])
    by_script = pd.read_csv(output, dtype=str, keep_default_na=False)
    assert by_script["question"].tolist() == frame["question"].tolist()
    assert "gone.png" in by_script["error"][3]
    root = [f"data.image_root={table.parent}"]
    by_api = vlmtune.load(tmp_path / "run" / "model", overrides=root).predict(frame)
    assert by_api["answer_predictions"].fillna("").tolist() == by_script["answer_predictions"].tolist()
    with (tmp_path / "run" / "predictions.csv").open() as file:
        by_run = [row["answer_predictions"] for row in csv.DictReader(file)]
    assert by_run[:3] == by_script["answer_predictions"][:3].tolist()


@pytest.mark.slow
def test_images_are_shown_once_for_the_answers_of_a_finished_run(
    overrides: Overrides, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows share an image, and only while that gives the answers of single rows."""
    vlmtune.train(overrides("trainer.eval_baseline=false"))
    shared_batches: list[int] = []

    def noting(model: Any, batch: Any, **options: Any) -> Any:
        shared_batches.append(batch.rows)
        return greedy_branches(model, batch, **options)

    monkeypatch.setattr(generate, "greedy_branches", noting)
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    predictor = vlmtune.load(tmp_path / "run", overrides=[f"data.image_root={table.parent}"])
    answers = predictor.predict(frame)["answer_predictions"].tolist()
    assert sum(shared_batches) >= len(frame)
    alone = frame.drop_duplicates("image_path")
    shared_batches.clear()
    assert predictor.predict(alone)["answer_predictions"].tolist() == [answers[i] for i in alone.index]
    assert not shared_batches
    evaluate_run(str(tmp_path / "run"), predictor.config, None)
    assert shared_batches
    shared_batches.clear()
    monkeypatch.setattr(probes, "answers_agree", lambda *_: False)
    assert predictor.predict(frame)["answer_predictions"].tolist() == answers
    assert not shared_batches


def test_wandb_gets_curves_config_and_images(overrides: Overrides, tmp_path: Path) -> None:
    vlmtune.train([o for o in overrides("trainer.log_every=1", "tracker.samples=4") if o != "tracker=none"])
    found = wandb_offline.read(tmp_path / "run")
    losses = [row["train/loss"] for row in found["history"] if "train/loss" in row]
    assert losses == [row["train/loss"] for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert any("eval/exact_match" in row for row in found["history"])
    assert found["config"]["adapter"]["r"] == 16
    assert len(found["images"]) == 2  # four samples about two images, the same in each evaluation
    assert found["exit_code"] == 0


def interrupted(command: list[str], folder: Path, number: signal.Signals) -> int:
    """Start a run, send it a signal once it has logged a step, and return its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "src/train.py", *command], env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and "train/loss" in (folder / "metrics.jsonl").read_text():
            process.send_signal(number)
            break
        time.sleep(0.02)
    return process.wait(timeout=120)


STEPS = 40
LOGGED = ["adapter.lora_dropout=0.1", "trainer.eval_baseline=false", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def straight(
    checkpoint_of: Callable[[str], Path], table: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run that was never stopped."""
    words = overrides_in(tmp_path_factory.mktemp("straight"), checkpoint_of("qwen2_vl"), table)
    return vlmtune.train(words(*LOGGED, steps=STEPS))


@pytest.mark.xdist_group("interrupted runs")
@pytest.mark.parametrize("number", thinned([signal.SIGTERM, signal.SIGINT], 1))
def test_an_interrupted_run_goes_on_where_it_stopped(
    overrides: Overrides, tmp_path: Path, straight: dict[str, Any], number: Any
) -> None:
    """Mid-epoch, with dropout: the weights at the end are those of a run that was never stopped, bit by bit."""
    stopped = tmp_path / "stopped"
    assert interrupted(overrides(*LOGGED, name="stopped", steps=STEPS), stopped, number) == 128 + number
    result = json.loads((stopped / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert 0 < result["steps"] < STEPS
    resumed = vlmtune.train([f"resume={stopped}"])
    assert resumed["steps"] == STEPS
    assert resumed["metrics"] == straight["metrics"]
    expected, found = weights(straight["folder"]), weights(resumed["folder"])
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    losses = [
        [row["train/loss"] for row in rows_of(folder) if "train/loss" in row]
        for folder in (Path(straight["folder"]), stopped)
    ]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_what_is_saved(overrides: Overrides, tmp_path: Path) -> None:
    """A learning rate that ruins the model after a good start: the good start is kept, and patience ends the run."""
    more = ["trainer.eval_every=1", "trainer.best_metric=eval/loss", "trainer.early_stopping_patience=2"]
    result = vlmtune.train(overrides(*more, "trainer.learning_rate=0.5", "trainer.scheduler.name=constant", steps=30))
    seen = [row["eval/loss"] for row in rows_of(tmp_path / "run") if "eval/loss" in row]
    assert result["steps"] < 30
    assert result["metrics"]["eval/loss"] == pytest.approx(min(seen[1:]), rel=1e-5)


def test_nonfinite_steps_stop_the_run_with_advice(overrides: Overrides, tmp_path: Path) -> None:
    with pytest.raises(vlmtune.TrainingError, match=r"trainer\.learning_rate"):
        vlmtune.train(overrides("trainer.learning_rate=1e38", "trainer.scheduler.warmup_fraction=0", "adapter=none"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"]["type"] == "NonFinite"


def test_preflight_only_trains_nothing(overrides: Overrides, tmp_path: Path) -> None:
    assert vlmtune.train(overrides("preflight=only"))["status"] == "preflight"
    assert not (tmp_path / "run" / "model").exists()
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(word in log for word in ("labels", "gradients", "batches", "language"))
    vlmtune.train(overrides("trainer.eval_baseline=false"))  # and its folder can be used


def test_dropped_rows_are_listed(overrides: Overrides, tmp_path: Path, table: Path) -> None:
    lines = table.read_text().splitlines()
    bad = table.parent / "bad.csv"
    bad.write_text("\n".join([*lines[:9], "gone.png,what?,red", *lines[9:]]) + "\n")
    with pytest.raises(vlmtune.DataError, match=r"gone\.png"):
        vlmtune.train(overrides(f"data.train={bad}"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    vlmtune.train(overrides(f"data.train={bad}", "data.on_bad_row=drop", "trainer.eval_baseline=false"))
    with (tmp_path / "run" / "quarantine.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["line"], row["row"]) == ("10", "9")
    assert "gone.png" in row["reason"]
