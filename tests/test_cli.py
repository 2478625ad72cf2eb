"""The scripts as a user meets them: help, mistakes, exit codes, and what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.config.schema import home

SOURCE = home() / "src"
GENEROUS_SECONDS = 30
"""Several times what a busy machine needs; the real figures are 1.2 s for --help and 0.8 s for a typo."""


def script(
    name: str, *words: str, folder: Path, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `src/<name>.py` in `folder`."""
    return subprocess.run(
        [sys.executable, *python, str(SOURCE / f"{name}.py"), *words],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=GENEROUS_SECONDS,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *lines: str) -> None:
    """One error, in one piece, on stderr, and nothing else."""
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines() == list(lines)


def csv_with(folder: Path, *rows: str) -> Path:
    file = folder / "rows.csv"
    file.write_text("\n".join(["image_path,question,answer", *rows]) + "\n")
    return file


# ---------------------------------------------------------------- looking


def test_help_lists_the_groups_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = script("train", "--help", folder=tmp_path, python=("-X", "importtime"))
    assert done.returncode == 0
    assert f"python {SOURCE}/train.py model=qwen2vl_7b adapter=lora quantization=nf4" in done.stdout
    lines = done.stdout.splitlines()
    for group in ("model", "adapter", "quantization", "trainer", "data", "optimizer", "task", "generation", "tracker"):
        assert any(line.startswith(f"{group}: ") for line in lines), group
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "peft", "pandas", "numpy", "wandb", "accelerate"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_each_script_has_help(name: str, tmp_path: Path) -> None:
    done = script(name, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python {SOURCE}/{name}.py run=outputs/runs/STAMP" in done.stdout


def test_flags_may_follow_overrides(tmp_path: Path) -> None:
    """argparse alone would call what follows a flag unknown."""
    done = script("train", "trainer.eval_batch_size=3", "--cfg", "job", "adapter=none", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "eval_batch_size: 3" in done.stdout


# ---------------------------------------------------------------- mistakes on the command line


def test_a_typo_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = script("train", "trainer.epoch=2", folder=tmp_path)
    refused(done, 1, "config error: trainer.epoch: no such key; did you mean epochs?")
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_are_one_list(tmp_path: Path) -> None:
    done = script("train", "model=pcio", "trainer.epochs=0", folder=tmp_path)
    refused(
        done,
        1,
        "config error: 2 problems",
        "  - model=pcio: did you mean pico?",
        "  - trainer.epochs=0.0: must be above 0",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    done = script("train", "trainer.epoch=2", folder=tmp_path, VLMTUNE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("config error: trainer.epoch: no such key; did you mean epochs?")


@pytest.mark.parametrize("words", [["trainer.epochs=[1"], ["foo"], ["--trainer.epochs=3"], ["--config-name=predict"]])
def test_a_command_line_that_cannot_be_read_exits_with_2(words: list[str], tmp_path: Path) -> None:
    done = script("train", *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious")
    done = script("train", "hydra.run.dir=run", folder=tmp_path)
    refused(
        done,
        1,
        "config error: run: holds a run already; choose another hydra.run.dir, or resume it: resume=run",
    )
    assert [file.read_text() for file in (tmp_path / "run").iterdir()] == ["precious"]


# ---------------------------------------------------------------- multirun


def test_a_multirun_under_a_launcher_is_refused_with_the_command_that_works(tmp_path: Path) -> None:
    """Each process would draw its own parameters."""
    done = script("train", "-m", "adapter.r=4,8", folder=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"python {SOURCE / 'train.py'} -m adapter.r=4,8")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_a_wrong_option_does_not_start(tmp_path: Path) -> None:
    done = script("train", "-m", "model=pico,pcio", folder=tmp_path)
    refused(done, 1, "config error: model=pcio: did you mean pico?")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_m_is_no_single_run(tmp_path: Path) -> None:
    done = script("train", "sweeps=lora_rank", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("config error: sweeps=lora_rank: means several runs; add -m")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- data


def test_a_missing_file_fails_the_run_and_says_so_in_its_result(tmp_path: Path) -> None:
    done = script("train", "data=csv", "data.train=nowhere.csv", "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("data error: ")
    assert "nowhere.csv" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]["type"]) == ("failed", "DataError")
    assert "nowhere.csv" in result["error"]["message"]


def test_bad_rows_fail_the_run_and_are_listed_in_a_file(tmp_path: Path) -> None:
    file = csv_with(tmp_path, "missing.png,What is it?,a circle", "also_missing.png,And this?,a square")
    done = script("train", "data=csv", f"data.train={file}", "hydra.run.dir=run", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("data error: ") == 1
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    quarantine = (tmp_path / "run" / "quarantine.csv").read_text()
    assert "missing.png" in quarantine
    assert len(quarantine.splitlines()) == 3


# ---------------------------------------------------------------- predict.py


def test_predict_needs_a_run(tmp_path: Path) -> None:
    refused(
        script("predict", "data.test=x.csv", folder=tmp_path),
        1,
        "config error: run: missing; give a run folder, for instance run=outputs/runs/<stamp>",
    )


def test_predict_says_which_folder_is_no_run(tmp_path: Path) -> None:
    done = script("predict", "run=nowhere", "data.test=x.csv", folder=tmp_path)
    refused(done, 1, "error: nowhere: is not a run folder (it has no config.yaml)")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command vlmtune


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m vlmtune` in `folder`; tests/test_wheel.py runs the installed command."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    line = [sys.executable, "-m", "vlmtune", *words]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=GENEROUS_SECONDS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_command_lists_its_commands(words: list[str], tmp_path: Path) -> None:
    done = command(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("  python -m vlmtune ")]
    assert listed == ["plan", "train", "predict", "evaluate", "compare", "merge", "chat"]


def test_a_mistyped_command_is_answered(tmp_path: Path) -> None:
    refused(command("trian", folder=tmp_path), 2, "usage error: trian: no such command; did you mean train?")


@pytest.mark.parametrize("word", ["-m", "model=pico"])
def test_the_command_comes_first(word: str, tmp_path: Path) -> None:
    wanted = f"usage error: {word}: the command comes first, for instance: python -m vlmtune train {word}"
    refused(command(word, "train", folder=tmp_path), 2, wanted)


def test_the_command_refuses_as_the_script_does(tmp_path: Path) -> None:
    done = command("train", "trainer.epoch=2", folder=tmp_path)
    refused(done, 1, "config error: trainer.epoch: no such key; did you mean epochs?")
    assert list(tmp_path.iterdir()) == []
