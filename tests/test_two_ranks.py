"""Two ranks on a CPU: they train and evaluate what one process does, end on a signal, and resume bit by bit.

Two launches do it all, since each start costs seconds of imports: `torchrun src/train.py`, which is sent a signal, and
one process group that resumes that run and trains the others, one after the other.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
import vlmtune
from runs import assert_same_weights, losses, weights
from vlmtune.config import compose
from vlmtune.predict.scores import evaluate_run

pytestmark = pytest.mark.xdist_group("two ranks")  # one worker, one pair of launches

STEPS = 16
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
PROGRAM = """
import hashlib, json, os, shutil, signal, sys, threading, time
from pathlib import Path
import torch, vlmtune
from vlmtune.cli.main import leave
from vlmtune.config import compose
from vlmtune.evaluation import evaluate
from vlmtune.predict.scores import evaluate_run
from vlmtune.training import loop

real, ready = loop.fit, []

def noting(model, *rest, **options):
    parameters = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    options["hooks"].before_step(5)
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    ready.append({
        "weights": hashlib.sha256(parameters).hexdigest(),
        "draws": torch.rand(4).tolist(),
        "sends buffers": model.broadcast_buffers,
        "hours": group.options._timeout.total_seconds() / 3600,
    })
    return real(model, *rest, **options)

loop.fit = noting
evaluate.ROUND = 1  # one rank has a batch more than the other

def signal_after_a_step(curve):
    while not (curve.exists() and "train/loss" in curve.read_text()):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)

folder, stopped, jobs = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
rank = os.environ["RANK"]
if stopped and rank == "1":
    threading.Thread(target=signal_after_a_step, args=[folder / stopped / "metrics.jsonl"], daemon=True).start()
for words in jobs:
    memory = vlmtune.train(words)["memory"]
    (folder / f"memory_{rank}.json").write_text(json.dumps(memory))
    if stopped and rank == "0" and not (folder / "stopped.json").exists():
        shutil.copy(folder / stopped / "result.json", folder / "stopped.json")
if stopped:
    (folder / f"ready_{rank}.json").write_text(json.dumps(ready))
last = words[-1].partition("=")[2]
config = compose.overlay(compose.compose("evaluate", ["++run=" + last]), ["run=" + last])
scores = evaluate_run(last, config, last + "/two.csv")
if rank == "0":
    (Path(last) / "two.txt").write_text(scores)
leave(0)
"""
"""Runs the jobs one after the other, notes what each rank has when training begins, and evaluates the last run. Rank 1
alone gets SIGTERM in the first one, if it is the run named `stopped`.
"""


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with two ranks; none is left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*TORCHRUN, *words], env=environment, stdout=out, stderr=out, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()  # a SIGKILL would leave its ranks behind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], folder: Path) -> Callable[..., list[str]]:
    """22 rows about 8 images in steps of 8 over all ranks: the last step of an epoch is short of rows."""
    rows = [(f"what is number {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(22)]
    table = tiny.write_csv(folder, rows, per_image=3)

    def make(name: str, *more: str, size: int = 4) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "generation.max_new_tokens=4"]
        data = ["data=csv", f"data.train={table}", f"data.validation={table}", "data.max_eval_rows=5", "tracker=none"]
        steps = [f"trainer.batch_size={size}", f"trainer.max_steps={STEPS}", "trainer.learning_rate=1e-2"]
        logged = [
            "trainer.log_every=1",
            "trainer.eval_every=6",
            "trainer.eval_baseline=false",
            "trainer.eval_batch_size=2",
        ]
        return [*model, *data, *steps, *logged, *more, f"hydra.run.dir={folder / name}"]

    return make


DROPOUT = "adapter.lora_dropout=0.1"


@pytest.fixture(scope="module")
def runs(overrides: Callable[..., list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """result.json of each run of two ranks; of the one that was stopped, as it was then and after it was resumed."""
    jobs = [
        overrides("resumed", DROPOUT),
        [f"resume={folder / 'resumed'}"],
        overrides("straight", DROPOUT),
        overrides("accumulated", "trainer.gradient_accumulation_steps=4", size=2),
    ]
    found = started_together(jobs, folder, ("resumed", "straight", "accumulated"), stopped="resumed")
    return {**found, "stopped": json.loads((folder / "stopped.json").read_text())}


@pytest.fixture(scope="module")
def layouts(overrides: Callable[..., list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """result.json of a run of two ranks in each layout."""
    jobs = [overrides(f"share_{share}", f"trainer.share_prefix={share}") for share in ("on", "off")]
    return started_together(jobs, folder, ("share_on", "share_off"))


def started_together(
    jobs: list[list[str]], folder: Path, names: Sequence[str], stopped: str = ""
) -> dict[str, dict[str, Any]]:
    """Run one job after the other on the same two ranks; their results by name."""
    (folder / "program.py").write_text(PROGRAM)
    with started([str(folder / "program.py"), str(folder), stopped, json.dumps(jobs)], folder / "runs.log") as process:
        code = process.wait(timeout=600)
    assert code == 0, (folder / "runs.log").read_text()[-3000:]
    return {name: json.loads((folder / name / "result.json").read_text()) for name in names}


def answers(run: Path) -> list[str]:
    with (run / "predictions.csv").open() as file:
        return [row["answer_predictions"] for row in csv.DictReader(file)]


def test_a_signal_to_one_ends_both_after_the_step(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["stopped"]["status"] == "interrupted"
    assert 0 < runs["stopped"]["steps"] < STEPS


def test_peak_memory_is_the_largest_of_all_ranks(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Each rank would otherwise return its own."""
    first, second = (json.loads((folder / f"memory_{rank}.json").read_text()) for rank in range(2))
    assert first == second == runs["accumulated"]["memory"]
    assert first["peak_rss_bytes"] >= first["startup_peak_rss_bytes"] > 1e7


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_both(overrides: Callable[..., list[str]], folder: Path) -> None:
    run = folder / "launched"
    curve, end = run / "metrics.jsonl", time.monotonic() + 300
    with started(["src/train.py", *overrides("launched", DROPOUT)], folder / "launched.log") as process:
        while not (curve.exists() and "train/loss" in curve.read_text()):
            assert process.poll() is None, (folder / "launched.log").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
        code = process.wait(timeout=120)
    assert code != 0
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"


def test_ranks_begin_with_the_same_weights_and_their_own_dropout(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """In each run, the resumed one too. Nobody sends buffers that don't change, and a save may take long."""
    first, second = (json.loads((folder / f"ready_{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert one["weights"] == other["weights"]
        assert one["draws"] != other["draws"]
        assert not one["sends buffers"]
        assert one["hours"] == 2


def test_the_stopped_run_is_resumed_bit_by_bit(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """With dropout, which each rank draws for itself."""
    assert runs["resumed"]["steps"] == STEPS
    assert runs["resumed"]["metrics"] == runs["straight"]["metrics"]
    assert losses(folder / "resumed") == losses(folder / "straight")
    assert_same_weights(folder / "resumed", folder / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("share", ["on", "off"])
def test_two_ranks_train_and_evaluate_what_one_process_does(
    layouts: dict[str, dict[str, Any]], overrides: Callable[..., list[str]], folder: Path, share: str
) -> None:
    """Up to float32's order of sums; five rows to evaluate are no multiple of two."""
    two, name = layouts[f"share_{share}"], f"one_{share}"
    one = vlmtune.train(overrides(name, f"trainer.share_prefix={share}", size=8))
    assert two["examples"] == one["examples"]
    assert losses(folder / f"share_{share}") == pytest.approx(losses(folder / name), abs=1e-4)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert answers(folder / f"share_{share}") == answers(folder / name)
    expected, found = weights(folder / name), weights(folder / f"share_{share}")
    assert all((expected[key] - found[key]).abs().max() < 1e-4 for key in expected)
    assert not (folder / "None").exists()


def test_two_ranks_evaluate_a_finished_run_as_one_process_does(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Five rows in batches of two, dealt in turn, with an exchange after each."""
    run = str(folder / "accumulated")
    config = compose.overlay(compose.compose("evaluate", [f"++run={run}"]), [f"run={run}"])
    assert evaluate_run(run, config, f"{run}/one.csv") == (folder / "accumulated" / "two.txt").read_text()
    one, two = ((folder / "accumulated" / name).read_text() for name in ("one.csv", "two.csv"))
    assert one == two
    assert len(one.splitlines()) == 6


def test_two_ranks_with_unequal_numbers_of_micro_batches_do_what_one_process_does(
    runs: dict[str, dict[str, Any]], overrides: Callable[..., list[str]], folder: Path
) -> None:
    """Steps of 16 rows: in every second one the first rank has three micro-batches, and the other none. Five rows to
    evaluate are no multiple of two.
    """
    two, one = runs["accumulated"], vlmtune.train(overrides("whole", size=16))
    assert two["examples"] == one["examples"]
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert answers(folder / "accumulated") == answers(folder / "whole")
    assert losses(folder / "accumulated") == pytest.approx(losses(folder / "whole"), abs=1e-4)
    expected, found = weights(folder / "whole"), weights(folder / "accumulated")
    assert all((expected[key] - found[key]).abs().max() < 1e-4 for key in expected)
