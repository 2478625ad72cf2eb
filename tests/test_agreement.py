"""Ranks that would train different things stop before they compute anything, and show both values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from vlmtune.commands import PACKAGE
from vlmtune.data.splits import RecordList, Split
from vlmtune.errors import ConfigError, DataError, VlmtuneError
from vlmtune.training import agreement

SPLITS = {"train": Split(RecordList(tiny.records(4)))}


@dataclass
class Several:
    """What `agreement` asks of an engine."""

    num_processes: int


def refused(
    monkeypatch: pytest.MonkeyPatch, *ranks: dict[str, Any], hosts: Sequence[str] = ("a", "a", "a", "a")
) -> VlmtuneError | None:
    """The error of the ranks that have these facts; what they send each other is put in place of the exchange."""
    sent = [
        (host, {name: str(value) for name, value in rank.items()}) for host, rank in zip(hosts, ranks, strict=False)
    ]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: sent)
    try:
        agreement.compare(ranks[0], Several(len(ranks)))  # type: ignore[arg-type]
    except VlmtuneError as error:
        return error
    return None


def test_ranks_that_agree_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = agreement.facts(tiny.config("model"), SPLITS)
    assert refused(monkeypatch, facts, dict(facts)) is None


def test_both_values_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (agreement.facts(tiny.config("model", learning_rate=rate), SPLITS) for rate in (1e-4, 2e-4))
    error = refused(monkeypatch, one, other)
    assert isinstance(error, ConfigError)
    [problem] = error.problems
    assert problem.startswith("trainer.learning_rate: rank 0 has 0.0001; rank 1 has 0.0002. ")


def test_machines_are_named_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [{"package torch": version} for version in ("2.13", "2.13", "2.12", "2.12")]
    error = refused(monkeypatch, *ranks, hosts=("one", "one", "two", "two"))
    assert str(error).startswith("package torch: ranks 0 (one), 1 (one) have 2.13; ranks 2 (two), 3 (two) have 2.12")


def test_other_rows_are_an_error_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    config, fewer = tiny.config("model"), {"train": Split(RecordList(tiny.records(3)))}
    error = refused(monkeypatch, agreement.facts(config, SPLITS), agreement.facts(config, fewer))
    assert isinstance(error, DataError)
    assert str(error).startswith("rows of train: rank 0 has ")


def test_a_split_that_only_one_rank_has_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, {"rows of train": 1}, {"rows of train": 1, "rows of test": 2})
    assert str(error).startswith("rows of test: rank 0 has nothing; rank 1 has 2")


def test_files_may_lie_elsewhere_on_each_machine() -> None:
    one, other = (tiny.config(f"/{place}/model") for place in "ab")
    other.data = replace(other.data, train="/b/rows.csv", image_root="/b")
    assert agreement.facts(one, SPLITS) == agreement.facts(other, SPLITS)


def test_a_key_that_only_begins_like_a_file_is_compared() -> None:
    one, other = tiny.config("model"), tiny.config("model")
    other.data = replace(other.data, validation_fraction=0.5)
    assert agreement.facts(one, SPLITS) != agreement.facts(other, SPLITS)


def test_all_of_the_code_counts() -> None:
    """Each file of the package by its content, and the packages that a result depends on."""
    facts = agreement.facts(tiny.config("model"), SPLITS)
    assert {f"vlmtune/{file.relative_to(PACKAGE)}" for file in PACKAGE.rglob("*.py")} <= facts.keys()
    assert {"package torch", "package transformers", "package peft"} <= facts.keys()
    assert agreement._hash(b"a") != agreement._hash(b"b")


def test_many_differences_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, *({f"vlmtune/{n}.py": rank for n in range(20)} for rank in range(2)))
    assert error is not None
    assert len(error.problems) == agreement.SHOWN + 1
    assert error.problems[-1].startswith("12 more differences")


# ---------------------------------------------------------------- two real ranks

SECOND_DIFFERS = """
import os, sys
from vlmtune.cli.main import run
other = sys.argv.pop()
if os.environ["RANK"] == "1": sys.argv.append(other)
run("train")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "error", "start"),
    [
        ("trainer.learning_rate=2e-4", "ConfigError", "trainer.learning_rate: rank 0 has 0.0001; rank 1 has 0.0002"),
        ("data.train={}/nowhere.csv", "DataError", "rank 1: "),  # before the ranks have met
        ("trainer.learning_rat=1", "ConfigError", "rank 1: trainer.learning_rat: no such key"),
    ],
)
def test_two_ranks_that_differ_stop_at_once(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, other: str, error: str, start: str
) -> None:
    tiny.write_csv(tmp_path, [(f"what is {i}?", "red") for i in range(8)], per_image=4)
    (tmp_path / "second.py").write_text(SECOND_DIFFERS)
    model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "trainer.learning_rate=1e-4"]
    words = [*model, "data=csv", f"data.train={tmp_path / 'rows.csv'}", f"hydra.run.dir={tmp_path / 'run'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "second.py"), *words, other.format(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]["type"]) == ("failed", error)
    assert result["error"]["message"].startswith(start)
    assert done.stderr.count(start) == 1  # the first rank says it, the other does not
