"""What a person sees of a sweep while it runs: on terminals of any size, without one, and of a real run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import runs
import terminal
import tiny
import vlmtune
from sweep_folders import begin, end, error, log, trial
from vlmtune.trials.overview import Overview
from vlmtune.trials.screen import Screen
from vlmtune.trials.watched import Watched

# ---------------------------------------------------------------- one trial's folder


def test_only_whole_lines_count_and_only_once(tmp_path: Path) -> None:
    watched = Watched(one := trial(tmp_path, 0), "exact_match")
    begin(one)
    log(one, 0, eval__exact_match=0.9)
    log(one, 1, train__loss=2.5)
    with (one.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')
        file.flush()
        watched.read(now=0.0)
        assert (watched.step, watched.total, watched.loss) == (1, 60, 2.5)
        assert watched.metric is None, "at step 0 it is the untrained model's"
        file.write('ss": null}\nno JSON\n')
    log(one, 10, eval__exact_match=0.5)
    watched.read(now=1.0)
    assert (watched.step, watched.metric) == (10, 0.5)
    assert str(watched.loss) == "nan"
    (one.folder / "metrics.jsonl").rename(tmp_path / "away")
    watched.read(now=2.0)
    assert watched.step == 10, "a folder that can't be read changes nothing"


def test_what_an_earlier_command_left_is_not_shown_as_this_ones(tmp_path: Path) -> None:
    """A trial that goes on from step 30 does not show step 40 of before until then, nor its pace."""
    begin(one := trial(tmp_path, 0))
    log(one, 40, train__loss=1.0, eval__exact_match=0.9)
    end(one, error=error("killed", "killed by SIGKILL"))
    one.state = "running"
    watched = Watched(one, "exact_match")
    watched.read(now=0.0)
    assert (watched.step, watched.total, watched.metric, watched.result) == (0, 0, None, None)
    again = one.folder / "new"
    again.write_text('{"step": 30, "train/loss": 1.5}\n')  # as MetricsFile goes on: cut at the checkpoint, replaced
    again.replace(one.folder / "metrics.jsonl")
    watched.read(now=100.0)
    assert (watched.step, watched.total, watched.left(100.0)) == (30, 60, None)
    log(one, 40, train__loss=1.4)
    watched.read(now=102.0)
    assert watched.left(102.0) == pytest.approx(4.0)
    assert watched.left(103.0) == pytest.approx(3.0)
    assert watched.left(110.0) == 0.0


def test_a_restart_inside_a_trial_begins_its_count_anew(tmp_path: Path) -> None:
    """Ray's, after a worker died: metrics.jsonl is cut at the checkpoint and replaced."""
    watched = Watched(one := trial(tmp_path, 0), "exact_match")
    begin(one)
    for now, step in enumerate((1, 10, 20)):
        log(one, step, train__loss=1.0)
        watched.read(float(now))
    assert watched.left(2.0) is not None
    (tmp_path / "cut").write_text('{"step": 10, "train/loss": 1.0}\n')
    (tmp_path / "cut").replace(one.folder / "metrics.jsonl")
    watched.read(3.0)
    assert (watched.step, watched.left(3.0)) == (10, None)


def test_a_trial_whose_result_is_damaged_or_missing_is_shown_all_the_same(tmp_path: Path) -> None:
    damaged, missing = trial(tmp_path, 0), trial(tmp_path, 1, state="failed")
    end(damaged, steps=3)
    (damaged.folder / "result.json").write_text("{")
    damaged.state = "failed"
    seen = Overview([damaged, missing], "exact_match")
    seen.read()
    assert "is damaged" in seen.watched[0].reason
    assert seen.watched[1].reason == "it left no result.json"


# ---------------------------------------------------------------- all trials


def test_the_best_is_the_greatest_finite_value_of_a_trial_that_did_not_fail(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number) for number in range(5)]
    seen = Overview(trials, "exact_match")
    seen.read()
    assert seen.best is None
    end(trials[0], metrics={"eval/exact_match": 0.5})
    end(trials[1], metrics={"eval/exact_match": 0.9}, error=error("killed", "killed by SIGKILL"))
    end(trials[2], metrics={"eval/exact_match": None})
    end(trials[3], metrics={"eval/exact_match": 0.5})
    begin(trials[4])
    log(trials[4], 1, train__loss=1.0)
    seen.read()
    assert seen.best is seen.watched[0]
    log(trials[4], 10, eval__exact_match=0.6)
    seen.read()
    assert seen.best is seen.watched[4]


def test_the_time_left_follows_completed_trials_and_how_many_run_at_once(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number) for number in range(8)]
    seen = Overview(trials, "exact_match")
    assert seen.left() is None
    seen.now = 100.0
    for number in (0, 1):
        begin(trials[number], total_steps=61)
        trials[number].began = 60.0
    assert seen.left() is None, "no pace yet"
    for step, now in ((1, 80.0), (21, 100.0)):
        log(trials[0], step, train__loss=1.0)
        seen.watched[0].read(now)
    # 40 steps of 1 s; a trial takes 40 s + 40 s; of the other 40 s are left, of the six that wait 480 s: two at once
    assert seen.left() == pytest.approx((40 + 40 + 6 * 80) / 2)
    trials[2].state, trials[2].began, trials[2].ended = "completed", 0.0, 50.0
    trials[3].state, trials[3].began, trials[3].ended = "failed", 0.0, 1.0  # says nothing about the others
    assert seen.left() == pytest.approx((40 + 10 + 4 * 50) / 2)
    for number in range(4, 8):
        trials[number].state = "interrupted"
    assert seen.left() == pytest.approx(40), "the sweep ends with its last trial"
    assert seen.counts() == "6 of 8 trials ended (1 failed, 4 interrupted), 0:40 left"


def test_of_many_trials_the_foremost_are_shown(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number) for number in range(9)]
    seen = Overview(trials, "exact_match")
    for number, value in enumerate((0.1, 0.9, 0.2, 0.3)):
        end(trials[number], metrics={"eval/exact_match": value})
        trials[number].ended = float(number)
    for number in (4, 6):
        begin(trials[number])
    seen.read()

    def numbers(most: int) -> list[int]:
        return [each.trial.number for each in seen.foremost(most)]

    assert numbers(1) == [4]
    assert numbers(3) == [1, 4, 6]
    assert numbers(4) == [1, 3, 4, 6]
    assert numbers(7) == [0, 1, 2, 3, 4, 5, 6]
    assert numbers(20) == list(range(9))


# ---------------------------------------------------------------- without a terminal


def test_without_a_terminal_a_line_tells_of_each_beginning_and_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, good, bad, stopped = trials = [trial(tmp_path, number) for number in range(4)]
    end(before, metrics={"eval/exact_match": 0.3})
    with Screen(trials, "exact_match") as screen:
        assert capfd.readouterr().err == ""
        begin(good, ago=65)
        screen.refresh()
        screen.refresh()
        assert capfd.readouterr().err == f"trial 1 ({good.label}) begins\n"
        log(good, 60, train__loss=1.0)
        end(good, metrics={"eval/exact_match": 0.53125})
        end(bad, error=error("config", "[/bold] adapter.r: must be greater\nand more"))
        screen.refresh()
        assert capfd.readouterr().err.splitlines() == [
            f"trial 1 ({good.label}) completed after 1:05: exact_match 0.5312, the best so far; "
            "3 of 4 trials ended (1 failed)",
            f"trial 2 ({bad.label}) failed: config: [/bold] adapter.r: must be greater ...; see {bad.folder}; "
            "3 of 4 trials ended (1 failed)",
        ]
        begin(stopped)
        log(stopped, 10, train__loss=1.0)
        screen.refresh()
        end(stopped, status="interrupted")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"trial 3 ({stopped.label}) begins"
    assert lines[1].startswith(f"trial 3 ({stopped.label}) interrupted after 0:00 at step 10; 4 of 4 trials ended")
    assert len(lines) == 2


# ---------------------------------------------------------------- on a terminal

SWEEP = """
import os, sys
from pathlib import Path
from sweep_folders import begin, end, error, log, trial
from vlmtune import display
from vlmtune.trials.screen import Screen
count = int(sys.argv[2])
trials = [trial(Path(sys.argv[1]), number) for number in range(count)]
with Screen(trials, "exact_match") as screen:
    for number, one in enumerate(trials[: count // 2]):
        begin(one, ago=60)
        screen.refresh()
        log(one, 60, train__loss=0.25)
        screen.refresh()
        bad = error("out_of_memory", "the device has no more memory [/dev/0]; trainer.batch_size=4 would need less")
        end(one, steps=60, metrics={"eval/exact_match": 0.8 - number / 1000}, error=None if number else bad)
        screen.refresh()
    for one in trials[count // 2 : count // 2 + 3]:
        begin(one)
        for step in (1, 10, 20, 30):
            log(one, step, train__loss=1.0)
            screen.refresh()
"""
AS_IT_RUNS = SWEEP + "    os._exit(0)  # the table stays\n"


@pytest.mark.parametrize(
    ("width", "height", "count", "columns"),
    [
        (120, 40, 12, ["#", "trial", "state", "step", "exact_match", "loss", "time"]),
        (80, 12, 100, ["#", "trial", "state", "step", "exact_match", "time"]),
        (40, 10, 100, ["#", "trial", "state", "exact_m…"]),
    ],
)
def test_on_a_terminal_a_table_of_any_size_keeps_up(
    tmp_path: Path, width: int, height: int, count: int, columns: list[str]
) -> None:
    lines = terminal.run(AS_IT_RUNS, str(tmp_path), str(count), width=width, height=height)
    heads = [number for number, line in enumerate(lines) if line.split()[:1] == ["#"]]
    assert len(heads) == 1, "each table takes the place of the one before"
    assert lines[heads[0]].split() == columns
    assert max(map(len, lines)) <= width
    assert len(lines) - heads[0] <= height
    above = " ".join(lines[: heads[0]])
    assert above.count("failed after 1:00: out_of_memory: the device has no more") == 1, "reasons stay readable"
    assert above.count("completed after 1:00: exact_match 0.7") == count // 2 - 1
    assert "begins" not in above
    rows = {found[1]: line for line in lines[heads[0] + 1 :] if (found := re.match(r" *(\d+)  ", line))}
    assert {"1", *(str(count // 2 + n) for n in range(3))} <= rows.keys(), "the best and the running ones"
    assert "0.7990 *" in rows["1"]
    assert "completed" in rows["1"]
    assert "━" in rows[str(count // 2)]
    if count == 12:
        assert "failed: out_of_memory" in rows["0"]
        assert "30/60" in rows["6"]
        assert lines[-1].startswith("6 of 12 trials ended (1 failed), ")
    else:
        text = " ".join(lines[heads[0] :])
        assert "50 of 100 trials ended (1 failed), " in text
        assert f"; {count - len(rows)} trials are not shown" in text


def test_a_log_line_stands_above_the_table(tmp_path: Path) -> None:
    said = '    display.log.warning("said beside it")\n'
    code = AS_IT_RUNS.replace("with Screen", "with display.logging_to(None), Screen")
    code = code.replace("    os._exit", f"{said}    screen.refresh()\n    os._exit")
    lines = terminal.run(code, str(tmp_path), "4", width=100, height=30)
    at = next(number for number, line in enumerate(lines) if "said beside it" in line)
    assert at < next(number for number, line in enumerate(lines) if line.split()[:1] == ["#"])
    assert sum("said beside it" in line for line in lines) == 1


def test_what_stays_of_a_sweep_are_lines(tmp_path: Path) -> None:
    """A search opens a screen for each of its batches: no table of an earlier one is left between them."""
    lines = terminal.run(SWEEP, str(tmp_path), "6", width=300, height=30)
    assert [line.split(" (")[0] for line in lines if line] == ["trial 0", "trial 1", "trial 2"]


def test_a_dumb_terminal_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "KIND", "dumb")
    lines = terminal.run(SWEEP, str(tmp_path), "4", width=200, height=30)
    assert sum("begins" in line for line in lines) == 4
    assert not [line for line in lines if line.split()[:1] == ["#"]]


def test_the_command_that_shows_a_sweep_never_imports_torch() -> None:
    """Its trials are forked from a process that must not have computed, and it is there for as long as they are."""
    code = "import sys, vlmtune.trials.screen, vlmtune.trials.summary; assert not {'torch', 'pandas'} & {*sys.modules}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# ---------------------------------------------------------------- a real run


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_real_run_is_followed_to_its_end(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(8)])
    words = [*runs.words(checkpoint_of("qwen2_vl"), table), f"data.validation={table}", "trainer.batch_size=4"]
    words += ["trainer.max_steps=6", "trainer.log_every=1", "trainer.eval_every=3", "generation.max_new_tokens=4"]
    watched = Watched(one := trial(tmp_path, 0), "exact_match")
    one.state, one.began = "running", 0.0
    seen: set[tuple[int, int, bool]] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            watched.read(1.0)
            seen.add((watched.step, watched.total, watched.metric is not None))

    beside = threading.Thread(target=watch)
    beside.start()
    try:
        result = vlmtune.train([*words, f"hydra.run.dir={one.folder}"])
    finally:
        over.set()
        beside.join()
    assert {(0, 0, False), (0, 6, False)} <= seen, "it starts, and evaluates the untrained model"
    assert any(0 < step <= 3 and total == 6 and not scored for step, total, scored in seen)
    assert any(3 <= step < 6 and scored for step, total, scored in seen)
    one.state = result["status"]
    watched.read(2.0)
    assert (watched.step, watched.metric) == (6, result["objective"])
    assert watched.loss == runs.losses(one.folder)[-1]
