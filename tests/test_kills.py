"""SIGKILL while whole runs train, save, evaluate and export: each goes on by the same command and ends as the straight
run did, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from killed import Kill, Starter
from runs import curve
from vlmtune import durable
from vlmtune.training import checkpoint

PLACES = [
    *(Kill("saving", f"os.{name}", count) for name in ("mkdir", "fsync", "rename") for count in (1, 2)),
    *(Kill("exporting", f"os.{name}") for name in ("mkdir", "fsync", "rename")),
    *(Kill("evaluating", f"vlmtune.evaluation.evaluate.{name}") for name in ("dealt", "_over_ranks", "score")),
]
QUICK = [*PLACES[1:6:2], *PLACES[10:], *PLACES[7:9]]
"""Kills in each kind of work, in the order in which a run does it; three more come at random moments."""
IN_A_RUN = 10
"""Kills of a run, before it is let to its end."""


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Starter:
    return Starter(tmp_path_factory.mktemp("notes") / "notes")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Callable[..., Any]:
    """22 rows in steps of 4, so that epochs end between checkpoints; features are kept, as is the default on a CPU."""
    rows = tmp_path_factory.mktemp("rows")
    table = tiny.write_csv(rows, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(22)], per_image=2)

    def make(folder: Path, *more: str) -> list[str]:
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "resume=auto", *more]
        data = ["data=csv", f"data.train={table}", f"data.validation={table}", "data.max_eval_rows=6"]
        steps = ["trainer.batch_size=4", "trainer.max_steps=9", "trainer.save_every=1", "trainer.learning_rate=1e-2"]
        evaluated = ["trainer.eval_every=3", "trainer.eval_batch_size=3", "generation.max_new_tokens=4"]
        return [*model, *data, *steps, *evaluated, "trainer.log_every=1", f"hydra.run.dir={folder}"]

    return make


KINDS = {
    "lora": ["adapter.lora_dropout=0.2"],
    "full": ["adapter=none", "model.freeze=[vision,projector]", "trainer.best_metric=eval/loss"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills_lose_nothing_and_change_nothing(
    starter: Starter, overrides: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    chance = random.Random(kind)
    kills = [*PLACES]
    for name, most in (("saving", 2), ("evaluating", 2), ("exporting", 1)):  # a run exports once
        kills += [Kill(name, count=1 + number % most, share=chance.uniform(0, 0.9)) for number in range(8)]
    kills += [Kill(share=chance.uniform(0.05, 0.8)) for _ in range(50 - len(kills))]
    chance.shuffle(kills)
    hits = survived(kills, starter, lambda folder: overrides(folder, *KINDS[kind]), tmp_path)
    print(*(f"{kind}: killed while {name}: {count}" for name, count in hits.items()), sep="\n")
    assert all(hits[name] >= 5 for name in ("saving", "evaluating", "exporting")), hits


@pytest.mark.xdist_group("forked")
def test_ten_kills_lose_nothing_and_change_nothing(
    starter: Starter, overrides: Callable[..., Any], tmp_path: Path
) -> None:
    """All of one run: the random moments come first, while it has about as much to do as the straight one."""
    chance = random.Random(0)
    kills = [*(Kill("training", share=chance.random() / 2) for _ in range(2)), Kill(share=chance.uniform(0.2, 0.6))]
    kills += QUICK
    hits = survived(kills[::-1], starter, lambda folder: overrides(folder, *KINDS["lora"]), tmp_path)
    assert all(hits[name] for name in ("saving", "evaluating", "exporting")), hits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_which_one_or_both_are_killed_end_as_those_that_were_not(
    overrides: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    more = [*KINDS[kind], "backend=accelerate", "backend.num_processes=2", "trainer.rows_per_step=4"]
    with started(overrides(tmp_path / "straight", *more)) as process:
        assert process.wait() == 0
    run = tmp_path / "run"
    for step, killed in ((2, {0}), (4, {1}), (6, {0, 1})):
        with started(overrides(run, *more)) as process:
            while f"step_{step:06d}" not in [path.name for path in checkpoint.all_checkpoints(run / "checkpoints")]:
                assert process.poll() is None
                time.sleep(0.001)
            for rank, pid in ranks_of(process.pid).items():
                if rank in killed:
                    os.kill(pid, signal.SIGKILL)
            assert process.wait() != 0
        assert_nothing_lost(run)
    with started(overrides(run, *more)) as process:
        assert process.wait() == 0
    assert_equal(run, tmp_path / "straight")


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    program = [sys.executable, "src/train.py", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(program, env=environment, start_new_session=True, stdout=quiet, stderr=quiet) as process:
        try:
            yield process
        finally:
            process.terminate()  # a SIGKILL would leave its ranks behind


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes that a launcher started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {int(word[5:]): int(pid) for pid, own in found.items() for word in own if word.startswith(b"RANK=")}


def survived(kills: Sequence[Kill], starter: Starter, words: Callable[[Path], list[str]], folder: Path) -> Counter[str]:
    """Kill runs in all these places, each one `IN_A_RUN` times before it may end. Returns what they did when they were
    killed.
    """
    straight = folder / "straight"
    assert starter.straight(words(straight)).code == 0, starter.output()
    left, hits = [*kills], Counter[str]()
    for number in range(len(kills)):
        run = folder / f"run{number}"
        for _ in range(min(IN_A_RUN, len(left))):
            ended = starter.run(words(run), left[-1])
            assert ended.code in (0, -signal.SIGKILL), starter.output()
            if ended.code == 0:  # it was too fast: the next run is killed earlier
                left[-1] = replace(left[-1], share=left[-1].share / 2)
                break
            left.pop()
            hits.update([name for name in ended.now if name != "training"] or ended.now or ["starting or ending"])
            assert_nothing_lost(run)
        else:
            assert starter.run(words(run)).code == 0, starter.output()
        assert_equal(run, straight)
        if not left:
            break
    assert not left
    return hits


def assert_nothing_lost(run: Path) -> None:
    """Each checkpoint that is to be seen is whole, and none is older than the last one that the log names as saved."""
    root = run / "checkpoints"
    for found in checkpoint.all_checkpoints(root):
        checkpoint.check(found)
    log = (run / "train.log").read_text() if (run / "train.log").exists() else ""
    said = re.findall(r"saved \S*(step_\d{6})", log.replace("\n", ""))
    assert not said or max(said) <= max(name for name in durable.names(root) if not name.endswith(".damaged"))
    if (model := durable.existing(run / "model")).exists():
        durable.verify(model)


def files(run: Path) -> dict[str, Path]:
    return {str(path.relative_to(run)): path for path in run.rglob("*")}


def assert_equal(run: Path, straight: Path) -> None:
    found, wanted = files(run), files(straight)
    assert found.keys() == wanted.keys()
    for name, path in wanted.items():
        if path.suffix == ".safetensors" or name == "predictions.csv":
            assert found[name].read_bytes() == path.read_bytes(), name
    assert curve(run) == curve(straight)
    assert result(run) == result(straight)


def result(run: Path) -> tuple[Any, ...]:
    found = json.loads((run / "result.json").read_text())
    return found["status"], found["steps"], found["examples"], found["metrics"]
