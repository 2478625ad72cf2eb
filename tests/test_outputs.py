"""Outputs of predict.py and evaluate.py: checked before anything is computed, and not lost when they are ended."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import tiny
import vlmtune
from grids import thinned
from vlmtune.config import compose
from vlmtune.config.schema import Config
from vlmtune.errors import ConfigError, DataError, VlmtuneError
from vlmtune.predict import files, scores
from vlmtune.predict.files import predict_file
from vlmtune.predict.scores import evaluate_run
from vlmtune.record import outputs, runfolder
from vlmtune.record.outputs import Answers, Rows, output_file, partial_of, warn_of_formulas

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks for it


# ---------------------------------------------------------------- the file


def test_a_new_file_and_former_answers_are_fine(tmp_path: Path) -> None:
    assert output_file(str(tmp_path / "new.csv"), [], tmp_path / "run") == tmp_path / "new.csv"
    assert list(tmp_path.iterdir()) == []
    former = tmp_path / "former.CSV"
    former.write_text("question,answer_predictions\na,b\n")
    assert output_file(str(former), [], tmp_path / "run") == former
    (tmp_path / "empty.csv").touch()  # as mktemp makes it
    output_file(str(tmp_path / "empty.csv"), [], tmp_path / "run")
    assert former.read_text() == "question,answer_predictions\na,b\n"


def bad_outputs(folder: Path) -> dict[str, tuple[str, str]]:
    """Name: what is given as output, and what the error says."""
    (folder / "dir.csv").mkdir()
    (folder / "table.csv").write_text("image_path,question,answer\n1.png,a,b\n")
    (folder / "notes.csv").write_text("my,notes\n1,2\n")
    (folder / "run").mkdir()
    (folder / "run" / "predictions.csv").write_text("answer_predictions\nx\n")
    os.mkfifo(folder / "pipe.csv")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        server.bind("socket.csv")
        os.chdir(here)
    (folder / "to_pipe.csv").symlink_to(folder / "pipe.csv")
    (folder / "to_table.csv").symlink_to(folder / "table.csv")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    (folder / "astray.csv").symlink_to(folder / "nowhere" / "x.csv")
    (folder / "blocked.csv.partial").mkdir()
    return {
        "empty": ("", "output: missing"),
        "blank": ("  ", "output: missing"),
        "folder": (f"{folder}/dir.csv", "is a folder"),
        "no folder": (f"{folder}/no/where.csv", "does not exist"),
        "other ending": (f"{folder}/answers.parquet", "answers.parquet.csv"),
        "no ending": (f"{folder}/answers", "answers.csv"),
        "pipe": (f"{folder}/pipe.csv", "not a regular file"),
        "socket": (f"{folder}/socket.csv", "not a regular file"),
        "link to a pipe": (f"{folder}/to_pipe.csv", "not a regular file"),
        "input": (f"{folder}/table.csv", "the table that is read"),
        "link to the input": (f"{folder}/to_table.csv", "the table that is read"),
        "input by another path": (f"{folder}/run/../table.csv", "the table that is read"),
        "the user's file": (f"{folder}/notes.csv", "no column answer_predictions"),
        "the run's file": (f"{folder}/run/predictions.csv", "belongs to the run"),
        "link to itself": (f"{folder}/loop.csv", "loop"),
        "link to nowhere": (f"{folder}/astray.csv", "does not exist"),
        "long name": (f"{folder}/{'x' * 300}.csv", "too long"),
        "zero byte": (f"{folder}/a\0b.csv", "null"),
        "no room for the partial file": (f"{folder}/blocked.csv", "can't be written"),
    }


def test_nothing_but_former_answers_is_replaced(tmp_path: Path) -> None:
    cases = bad_outputs(tmp_path)
    before = {path: path.lstat().st_mode for path in tmp_path.rglob("*")}
    for name, (output, expected) in cases.items():
        with pytest.raises(ConfigError) as caught:
            output_file(output, [str(tmp_path / "table.csv"), "gone.csv"], tmp_path / "run")
        assert expected in str(caught.value).lower(), name
        assert "\n" not in str(caught.value)
    assert {path: path.lstat().st_mode for path in tmp_path.rglob("*")} == before


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "answers.csv"
    link.symlink_to(tmp_path / "far" / "there.csv")
    target = output_file(str(link), [], tmp_path / "run")
    Rows(target, Answers(pd.DataFrame({"question": ["a"]}), texts={0: "b"})).finish()
    assert link.is_symlink()
    assert (tmp_path / "far" / "there.csv").read_text() == "question,answer_predictions\na,b\n"


def test_a_link_in_the_place_of_the_partial_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    target = tmp_path / "answers.csv"
    partial_of(target).symlink_to(tmp_path / "precious")
    Rows(target, Answers(pd.DataFrame({"question": ["a"]}))).finish()
    assert (tmp_path / "precious").read_text() == "mine"
    assert not target.is_symlink()


def test_rows_of_an_interrupted_call_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "a.csv"
    for text in ("first", "second", "third"):
        assert output_file(str(target), [], tmp_path / "run") == target
        rows = Rows(target, Answers(pd.DataFrame({"n": [1, 2]}), texts={0: text}))
        rows.write(1)
        with pytest.raises(ConfigError, match="another process is writing"):
            output_file(str(target), [], tmp_path / "run")
        rows.close()
    names = ("a.csv.partial.1", "a.csv.partial.2", "a.csv.partial")
    assert [pd.read_csv(tmp_path / name)["answer_predictions"][0] for name in names] == ["first", "second", "third"]
    assert "kept as a.csv.partial.1" in caplog.text


def test_a_write_protected_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("answer_predictions\nx\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(ConfigError, match="write-protected"):
        output_file(str(tmp_path / "a.csv"), [], tmp_path / "run")


def test_a_folder_that_vanishes_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    rows = Rows(tmp_path / "out" / "a.csv", Answers(pd.DataFrame({"n": [1]}), texts={0: "x"}))
    rows.write(1)
    (tmp_path / "out" / "a.csv.partial").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(VlmtuneError, match="all rows are in"):
        rows.finish()


# ---------------------------------------------------------------- rows


def test_rows_are_in_the_partial_file_as_they_come(tmp_path: Path) -> None:
    answers = Answers(pd.DataFrame({"n": [1, 2, 3], "w": [0.5, None, 2.0]}, index=[7, 7, 7]))
    rows = Rows(tmp_path / "a.csv", answers)
    assert not rows.partial.exists()
    answers.texts[0] = 'two\nlines, "quoted"'
    rows.write(1)
    assert pd.read_csv(rows.partial)["answer_predictions"].tolist() == ['two\nlines, "quoted"']
    answers.texts[1] = ""
    rows.write(2)
    answers.reasons[2] = "no such image"
    rows.write(3)
    rows.finish()
    assert not rows.partial.exists()
    written = pd.read_csv(tmp_path / "a.csv", keep_default_na=False, dtype=str)
    assert written.columns.tolist() == ["n", "w", "answer_predictions", "error"]
    assert written["error"].tolist() == ["", "", "no such image"]
    assert written["n"].tolist() == ["1", "2", "3"]


def test_a_full_disk_is_one_sentence_and_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(pd.DataFrame({"n": [1, 2]}), texts={0: "a", 1: "b"})
    rows = Rows(tmp_path / "a.csv", answers)
    rows.write(1)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows, "file", rows.file)
    real, rows.file = rows.file, type("Full", (), {"write": lambda self, text: full(), "flush": full})()
    with pytest.raises(VlmtuneError, match="No space left"):
        rows.write(2)
    real.close()
    assert rows.partial.read_text() == "n,answer_predictions\n1,a\n"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["question", "answer_predictions"], "'answer_predictions'"),
        (["error", "question"], "error_before"),
        (pd.MultiIndex.from_tuples([("a", "b")]), "levels"),
        (["question", "x", "x"], "2 columns 'x'"),
    ],
)
def test_columns_of_the_input_are_not_overwritten(columns: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        outputs.refuse_columns(columns, ("answer_predictions", "error"), "t.csv")


def test_formulas_are_told_and_left_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = ["=1+1", "@x", "+cmd|'/c'", "-A1", "\tx", "-5", "+1,000.5", "-3%", "red", "- 2"]
    with caplog.at_level("WARNING", logger="vlmtune"):
        warn_of_formulas(tmp_path / "a.csv", answers)
        warn_of_formulas(tmp_path / "b.csv", ["-5", "3", "red"])
    assert [record.args[1] for record in caplog.records] == [6]
    Rows(tmp_path / "a.csv", Answers(pd.DataFrame({"n": range(10)}), texts=dict(enumerate(answers)))).finish()
    assert pd.read_csv(tmp_path / "a.csv")["answer_predictions"].tolist() == answers


def test_a_runs_own_predictions_keep_the_inputs_columns(tmp_path: Path) -> None:
    """Training goes on whatever the table's columns are called."""
    from vlmtune.data.records import Record, Turn
    from vlmtune.data.splits import RecordList, Split
    from vlmtune.evaluation.evaluate import Evaluation

    frame = pd.DataFrame({"question": ["a"], "score": [7], "answer_predictions": ["old"]})
    split = Split(RecordList([Record((Turn("a", ("b",)),))]), frame)
    runfolder.write_predictions(tmp_path / "p.csv", split, Evaluation({}, ["new"], [{"m": 1.0}]), "m")
    [row] = pd.read_csv(tmp_path / "p.csv").to_dict("records")
    assert row == {
        "question": "a",
        "score_before": 7,
        "answer_predictions_before": "old",
        "answer_predictions": "new",
        "score": 1.0,
    }


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> Path:
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    table = tiny.write_csv(folder, [(f"what is {i}?", "red") for i in range(4)])
    vlmtune.train(
        [
            "model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "data=csv", f"data.train={table}", "tracker=none",
            "trainer.max_steps=1", "trainer.batch_size=2", "trainer.eval_batch_size=2", "generation.max_new_tokens=3",
            f"hydra.run.dir={folder / 'run'}",
        ]
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def asked(trained: Path, tmp_path: Path) -> tuple[Config, Path]:
    """The config for answering a table of six rows, and that table."""
    table = tiny.write_csv(tmp_path, [(f"what is {i}?", "red") for i in range(6)])
    words = [f"run={trained}", f"data.test={table}"]
    return compose.overlay(compose.compose("predict", [f"++{word}" for word in words]), words), table


def no_model(*given: Any) -> Any:
    raise AssertionError("the model was opened")


def test_bad_outputs_and_columns_are_refused_before_the_model_is_opened(
    trained: Path, asked: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, table = asked
    for module in (files, scores):
        monkeypatch.setattr(module, "Predictor", no_model)
    for job in (predict_file, evaluate_run):
        with pytest.raises(ConfigError, match="is the table that is read"):
            job(str(trained), dataclasses.replace(config), str(table))
    frame = pd.read_csv(table)
    frame.assign(error="x").to_csv(table, index=False)
    with pytest.raises(DataError, match="error_before"):
        predict_file(str(trained), config, str(tmp_path / "out.csv"))
    frame.assign(score=1).to_csv(table, index=False)
    with pytest.raises(DataError, match="score_before"):
        evaluate_run(str(trained), config, str(tmp_path / "out.csv"))
    frame.assign(image_path="gone.png").to_csv(table, index=False)
    with pytest.raises(DataError, match="no row can be used"):
        predict_file(str(trained), config, str(tmp_path / "out.csv"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def failing_at(question: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let generation fail for every batch that holds this question."""
    from vlmtune.evaluation import generate

    plain = generate.generate

    def flawed(model: Any, encoder: Any, records: Any, *more: Any, **options: Any) -> Any:
        if any(record.question == question for record in records):
            raise error
        return plain(model, encoder, records, *more, **options)

    monkeypatch.setattr(generate, "generate", flawed)


@pytest.mark.parametrize(
    "error",
    thinned(
        [
            DataError("damaged image: 3.png: broken in the meantime"),
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            MemoryError(),
        ],
        2,
    ),
    ids=str,
)
def test_one_bad_row_costs_that_row_alone(
    trained: Path, asked: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, _ = asked
    predict_file(str(trained), config, str(tmp_path / "all.csv"))
    failing_at("what is 3?", error, monkeypatch)
    assert predict_file(str(trained), config, str(tmp_path / "out.csv")) == 1
    whole, rest = (pd.read_csv(tmp_path / name, keep_default_na=False) for name in ("all.csv", "out.csv"))
    assert whole.columns.tolist() == ["image_path", "question", "answer", "answer_predictions"]
    assert [bool(text) for text in rest["error"]] == [False, False, False, True, False, False]
    expected = whole["answer_predictions"].tolist()
    assert rest["answer_predictions"].tolist() == [*expected[:3], "", *expected[4:]]


def test_an_ended_prediction_leaves_whole_rows(
    trained: Path,
    asked: tuple[Config, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, table = asked
    failing_at("what is 4?", KeyboardInterrupt(), monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        predict_file(str(trained), config, str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()
    assert "out.csv.partial: holds the first 4 of 6 rows" in capsys.readouterr().err
    left = pd.read_csv(tmp_path / "out.csv.partial", keep_default_na=False)
    assert left["question"].tolist() == pd.read_csv(table)["question"].tolist()[:4]
    monkeypatch.undo()
    assert predict_file(str(trained), config, str(tmp_path / "out.csv")) == 0  # again, from the start
    assert not (tmp_path / "out.csv.partial").exists()


def test_an_ended_evaluation_leaves_whole_rows(
    trained: Path, asked: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmtune.evaluation import answering
    from vlmtune.evaluation import evaluate as evaluation

    config, table = asked
    evaluate_run(str(trained), config, str(tmp_path / "whole.csv"))
    monkeypatch.setattr(evaluation, "ROUND", 2)
    plain, calls = answering.loss_and_likely, iter(range(9))

    def ended(*given: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(answering, "loss_and_likely", ended)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(str(trained), config, str(tmp_path / "out.csv"))
    left, whole = (pd.read_csv(tmp_path / name, keep_default_na=False) for name in ("out.csv.partial", "whole.csv"))
    assert whole.columns.tolist() == [*pd.read_csv(table).columns, "answer_predictions", "score"]
    pd.testing.assert_frame_equal(left, whole[:4])
    assert evaluate_run(str(trained), config, str(tmp_path / "out.csv")) != ""
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv", keep_default_na=False), whole)


@pytest.mark.parametrize("word", ["resume=x", "preflight=only", "adapter.r=4", "optimizer.weight_decay=1"])
def test_a_key_that_a_finished_run_does_not_use_is_refused(trained: Path, word: str) -> None:
    words = [f"run={trained}", word]
    with pytest.raises(ConfigError, match="no effect on a finished run"):
        compose.overlay(compose.compose("predict", [f"++{each}" for each in words]), words)


def test_an_image_that_breaks_after_the_check(
    trained: Path, asked: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, table = asked
    audited = files.audited

    def then_broken(*given: Any) -> Any:
        split = audited(*given)
        (table.parent / "1.png").unlink()
        (table.parent / "4.png").write_bytes(b"no image any more")
        return split

    monkeypatch.setattr(files, "audited", then_broken)
    assert predict_file(str(trained), config, str(tmp_path / "out.csv")) == 2
    errors = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)["error"].tolist()
    assert ["no such image" in errors[1], "not an image" in errors[4]] == [True, True]
    assert sum(map(bool, errors)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_sentence(
    trained: Path, asked: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from vlmtune.evaluation import generate
    from vlmtune.launch.signals import Interrupted

    config, _ = asked
    monkeypatch.setattr(generate, "generate", lambda *given, **options: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        predict_file(str(trained), config, str(tmp_path / "out.csv"))


def test_the_callers_frame_is_left_alone(trained: Path) -> None:
    predictor = vlmtune.load(trained)
    picture = Image.new("RGBA", (64, 64), (0, 0, 255, 100))
    frame = pd.DataFrame({"image_path": [picture] * 3, "question": ["a?", "b?", "a?"]}, index=[5, 5, "x"])
    before = frame.copy()
    out = predictor.predict(frame)
    assert out.index.tolist() == [5, 5, "x"]
    assert out["answer_predictions"].iloc[0] == out["answer_predictions"].iloc[2]
    pd.testing.assert_frame_equal(frame, before)
    assert picture.mode == "RGBA"
    with pytest.raises(DataError, match="answer_predictions_before"):
        predictor.predict(out)
