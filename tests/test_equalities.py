"""Any number of processes, sharded or not, straight or resumed on the same number or another: the table of equalities
in docs/results.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import forked
import tiny
import vlmtune
from runs import losses, weights, words

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("equalities")]

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
NUMBERS = (1, 2, 4)
RESUMED_ON = {1: 2, 2: 4, 4: 1}
"""Processes of a run until its checkpoint in the middle, and from there on."""
STEPS, MIDDLE = 6, 3
KINDS = {"LoRA": ["adapter=lora"], "all weights": ["adapter=none"]}
WAYS = {"copies (DDP)": "none", "shares (FSDP2)": "fsdp"}
ROUNDING = 1e-6


def train(jobs: Sequence[tuple[Path, Path | None, list[str]]]) -> None:
    """One rank's part of one job after the other; a job may begin with a copy of another run, cut back."""
    for run, copied, given in jobs:
        if copied is not None and os.environ["RANK"] == "0":
            as_if_killed(copied, run)
        vlmtune.train([*given, f"hydra.run.dir={run}"])


def as_if_killed(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model", "result.json", "predictions.csv"))
    for folder in (copy / "checkpoints").iterdir():
        if folder.name != f"step_{MIDDLE:06d}":
            shutil.rmtree(folder)


class Runs:
    """All runs of the table, made in four launches."""

    def __init__(self, folder: Path, words: list[str]):
        self.folder, self.words = folder, words
        for count in NUMBERS:
            before = {after: first for first, after in RESUMED_ON.items()}[count]
            origins = [count, count] if count == 1 else [count, count, before]
            self._launch(count, [None, *origins[1:]])
        self._launch(1, [4])

    def of(self, kind: str, way: str, count: int, origin: int | None = None) -> Path:
        """The folder of a run on `count` processes, straight or resumed from a run on `origin` of them."""
        name = f"{kind} {WAYS[way]} {count} {'' if origin is None else f'from {origin}'}".strip().replace(" ", "_")
        return self.folder / name

    def _launch(self, count: int, origins: list[int | None]) -> None:
        jobs = []
        for origin in origins:
            for kind, way in CELLS:
                copied = None if origin is None else self.of(kind, way, origin)
                words = [*self.words, *KINDS[kind], f"sharding={WAYS[way]}"]
                jobs.append((self.of(kind, way, count, origin), copied, words))
        forked.as_ranks(count, self.folder / "ranks.log", train, jobs)

    def verdict(self, found: Path, wanted: Path) -> str:
        """How near two runs are: their losses and final weights."""
        tensors, expected = weights(found), weights(wanted)
        assert tensors.keys() == expected.keys()
        assert len(losses(found)) == STEPS
        if losses(found) == losses(wanted) and all(tensors[name].equal(expected[name]) for name in expected):
            return "bit for bit"
        apart = max((tensors[name] - expected[name]).abs().max().item() for name in expected)
        apart = max(apart, *(abs(a - b) for a, b in zip(losses(found), losses(wanted), strict=True)))
        return "rounding" if apart < ROUNDING else f"{apart:.0e}"


CELLS = [(kind, way) for kind in KINDS for way in WAYS]
COLUMNS = [
    "1, resumed",
    "1, resumed on 2",
    *(f"{n}{rest}" for n in (2, 4) for rest in (" as 1", ", resumed", f", resumed on {RESUMED_ON[n]}")),
]


@pytest.fixture(scope="module")
def runs(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """22 rows about 8 images in steps of 8: an epoch's last step is short of rows."""
    folder = tmp_path_factory.mktemp("equalities")
    rows = [(f"what is number {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(22)]
    table = tiny.write_csv(folder, rows, per_image=3)
    steps = ["trainer.rows_per_step=8", "trainer.batch_size=2", f"trainer.max_steps={STEPS}"]
    saved = [f"trainer.save_every={MIDDLE}", "trainer.log_every=1", "resume=auto"]
    # with Adam's usual eps, a gradient of rounding errors alone would take a step of full size
    rest = [*steps, *saved, "trainer.learning_rate=1e-3", "optimizer.eps=1e-3"]
    return Runs(folder, [*words(checkpoint_of("qwen2_vl"), table), *rest])


def row(runs: Runs, kind: str, way: str) -> list[str]:
    alone = runs.of(kind, "copies (DDP)", 1)
    found = []
    for count in NUMBERS:
        straight = runs.of(kind, way, count)
        after = RESUMED_ON[count]
        found += [runs.verdict(straight, alone)] if count > 1 else []
        found += [runs.verdict(runs.of(kind, way, count, count), straight)]
        found += [runs.verdict(runs.of(kind, way, after, count), straight)]
    return found


@pytest.mark.parametrize(("kind", "way"), CELLS)
def test_runs_are_as_near_as_the_table_says(runs: Runs, kind: str, way: str) -> None:
    line = f"| {kind}, {way} | {' | '.join(row(runs, kind, way))} |"
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_these_columns() -> None:
    assert f"| processes | {' | '.join(COLUMNS)} |" in PAGE.read_text(encoding="utf-8").splitlines()


def test_one_process_has_nothing_to_share(runs: Runs) -> None:
    for kind in KINDS:
        assert runs.verdict(runs.of(kind, "shares (FSDP2)", 1), runs.of(kind, "copies (DDP)", 1)) == "bit for bit"
