"""Several files as one split, each with its own folder, lines and columns; repeated rows; lists inside JSON objects."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from vlmtune.config import compose
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.sources.files import read_table
from vlmtune.data.table import load, read_files
from vlmtune.errors import ConfigError, DataError
from vlmtune.launch import surroundings
from vlmtune.predict.predictor import Predictor
from vlmtune.record import runfolder


def without_model() -> Any:
    """A predictor whose answers a test makes itself."""
    predictor = Predictor.__new__(Predictor)
    predictor.config, predictor.random_state = tiny.config(None), surroundings.random_state()
    predictor.shares_answers = lambda records: False  # type: ignore[method-assign]
    predictor.encoder = SimpleNamespace(image_cache="its own")
    predictor.engine = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    return predictor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders whose images have the same names and other contents."""
    for name, shade in (("one", 10), ("two", 90)):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (4, 4), (shade, number, 0)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def split(*names: str, **data: Any) -> Any:
    return load(DataConfig(train=list(names), **data), TaskConfig(), 0)["train"]


def test_each_file_has_its_own_folder_lines_and_columns(folder: Path) -> None:
    a = write(
        folder / "one" / "a, b=[1].csv", 'image_path,question,answer,level\n0.png,"x\ny",red,hard\n1.png,,red,7\n'
    )
    b = write(folder / "two" / "b.jsonl", '{"image_path": "0.png", "question": "x\\ny", "answer": "red", "id": 12}\n')
    found = split(a, b)
    assert [record.images[0] for record in found.records] == [
        folder / "one" / "0.png",
        folder / "one" / "1.png",
        folder / "two" / "0.png",
    ]
    assert [record.place for record in found.records] == [
        f"{a}, line 2, row 1",
        f"{a}, line 4, row 2",
        f"{b}, line 1, row 1",
    ]
    assert [record.row for record in found.records] == [0, 1, 2]
    assert found.frame["level"].tolist() == ["hard", "7", None]
    assert found.frame["id"].tolist() == [None, None, "12"], "the digits of the file, beside missing cells too"


def test_bad_rows_name_their_own_file_and_line(folder: Path) -> None:
    a = write(folder / "one" / "a.csv", "image_path,question,answer\n0.png,what?,red\n9.png,what?,red\n")
    b = write(folder / "two" / "b.csv", "image_path,question,answer\n0.png,what?\n1.png,what?,red\n")
    with pytest.raises(BadRowsError) as caught:
        split(a, b)
    assert f"  {b}, line 2, row 1: too few fields" in str(caught.value)
    assert "2 of 4 rows" in str(caught.value)
    found = split(a, b, on_bad_row="drop", max_bad_fraction=0.5)
    assert [(row.file, row.line, row.row, row.index) for row in found.bad] == [(a, 3, 2, 1), (b, 2, 1, 2)]
    assert [record.row for record in found.records] == [0, 3]


def test_a_file_of_other_columns_is_named(folder: Path) -> None:
    a = write(folder / "a.csv", "image_path,question,answer\none/0.png,what?,red\n")
    b = write(folder / "b.csv", "image_path,question,Answer\none/0.png,what?,red\n")
    with pytest.raises(DataError) as caught:
        split(a, b, str(folder / "gone.csv"))
    assert len(caught.value.problems) == 2
    assert f"{b}: no column 'answer'" in caught.value.problems[0]


def test_one_image_in_two_files_is_one_group_and_held_out_whole(folder: Path) -> None:
    """By path and by content: a question about a training image in validation measures memory."""
    (folder / "two" / "1.png").write_bytes((folder / "one" / "1.png").read_bytes())
    a = write(folder / "one" / "a.csv", "image_path,question,answer\n0.png,a?,red\n1.png,b?,red\n")
    b = write(folder / "two" / "b.csv", "image_path,question,answer\n../one/0.png,c?,red\n1.png,d?,red\n")
    groups = [record.group for record in split(a, b).records]
    assert groups[0] == groups[2] != groups[1] == groups[3]
    config = DataConfig(train=[a, b], validation_fraction=0.5)
    halves = load(config, TaskConfig(), 0)
    questions = {name: {record.question for record in half.records} for name, half in halves.items()}
    assert set(map(frozenset, questions.values())) == {frozenset(("a?", "c?")), frozenset(("b?", "d?"))}


def test_answers_and_errors_stay_beside_their_rows(folder: Path) -> None:
    """A row of the second file whose number in it is that of a good row in the first."""
    a = write(folder / "one" / "a.csv", "image_path,question\n0.png,a?\n1.png,b?\n")
    b = write(folder / "two" / "b.csv", "image_path,question,note\n0.png,c?,n\n9.png,d?,m\n2.png,e?\n3.png,f?,o\n")
    frame = read_files(DataConfig(test=[a, b]))["test"]
    predictor = without_model()
    predictor._answer = lambda encoder, records, share: [record.question.upper() for record in records]
    answered = predictor.predict(frame)
    assert answered["answer_predictions"].fillna("-").tolist() == ["A?", "B?", "C?", "-", "-", "F?"]
    assert answered["note"].tolist() == [None, None, "n", "m", None, "o"]
    errors = answered["error"].fillna("").tolist()
    assert [bool(error) for error in errors] == [False, False, False, True, True, False]
    assert "no such image" in errors[3]
    assert errors[4].startswith("line 4: too few fields"), "its cells are empty, so its line says which row it was"


def test_faults_stay_with_their_rows_when_a_frame_is_cut(folder: Path) -> None:
    path = write(folder / "one" / "a.csv", "image_path,question\n0.png,a?\n1.png\n2.png,c?\n3.png,d?\n")
    frame = read_table(path).iloc[[3, 1]]
    predictor = without_model()
    predictor._answer = lambda encoder, records, share: [record.question for record in records]
    assert predictor.predict(frame)["answer_predictions"].fillna("-").tolist() == ["d?", "-"]


# ---------------------------------------------------------------- keys


def test_lists_of_files_are_saved_as_absolute_paths_and_read_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "two"))
    config = tiny.config("model")
    config.data = DataConfig(
        train=["one/a.csv", "~/b, c=[d].csv", "one/c.json:annotations"],
        test="one/t.tsv",
        image_root={"train": "one", "test": "~"},
    )
    (folder / "run").mkdir()
    runfolder.write_config(folder / "run" / "config.yaml", config)
    saved = compose.saved_config("run", [])
    assert list(saved.data.train) == [
        f"{folder}/one/a.csv",
        f"{folder}/two/b, c=[d].csv",
        f"{folder}/one/c.json:annotations",
    ]
    assert saved.data.test == f"{folder}/one/t.tsv"
    assert dict(saved.data.image_root) == {"train": f"{folder}/one", "test": f"{folder}/two"}


@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.test"])
def test_two_files_without_brackets_say_how(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose.read("train", ["data=csv", f"{key}=a.csv,b.csv"])
    assert f"{key}=[a.csv,b.csv]" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=['a, b.csv','c=d.csv']", ["a, b.csv", "c=d.csv"]),
        ("data.train=a.json:annotations", "a.json:annotations"),
        ("data.train=null", None),
        ("data.train=[]", "a list of files"),
        ("data.train=[1,a.csv]", "a list of files"),
        ("data.train={a: b}", "a list of files"),
        ("data.image_root={train: a, validation: b}", {"train": "a", "validation": "b"}),
        ("data.image_root={trian: a}", "one per split"),
        ("data.image_root=[a]", "one per split"),
    ],
)
def test_files_and_folders_are_checked_as_they_are_typed(override: str, expected: Any) -> None:
    key = override.split("=")[0].split(".")[1]
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(ConfigError, match=expected):
            compose.read("train", ["data=csv", override])
    else:
        assert getattr(compose.read("train", ["data=csv", override])[0].data, key) == expected


def test_a_hub_reads_one_set(folder: Path) -> None:
    with pytest.raises(DataError, match="data=hub reads one data set"):
        load(DataConfig(_target_="vlmtune.data.sources.hub.load", train=["a", "b"]), TaskConfig(), 0)


# ---------------------------------------------------------------- image_root


def test_each_split_may_have_its_own_images(folder: Path) -> None:
    table = "image_path,question,answer\n0.png,what?,red\n"
    files = {name: write(folder / f"{name}.csv", table) for name in ("train", "validation", "test")}
    root = {"train": str(folder / "one"), "validation": str(folder / "two")}
    with pytest.raises(BadRowsError, match=f"no such image: {folder}/0.png"):
        load(DataConfig(**files, image_root=root), TaskConfig(), 0)  # type: ignore[arg-type]
    root["test"] = root["validation"]
    found = load(DataConfig(**files, image_root=root), TaskConfig(), 0)  # type: ignore[arg-type]
    assert [part.records[0].images[0].parent.name for part in found.values()] == ["one", "two", "two"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("typed", "root"),
    [
        (["data.test=OWN"], "ROOT"),
        ([], "ROOT"),
        (["data.test=OTHER"], None),
        (["data.test=[OTHER,OWN]"], None),
        (["data.test=OTHER", "data.image_root=ELSE"], "ELSE"),
        (["data.test=OTHER", "data.image_root={test: ELSE}"], {"test": "ELSE"}),
    ],
)
def test_a_runs_images_are_not_those_of_another_table(typed: list[str], root: Any, tmp_path: Path) -> None:
    config = tiny.config(str(tmp_path))
    config.data = DataConfig(train="t.csv", test=str(tmp_path / "OWN"), image_root="/ROOT")
    runfolder.write_config(tmp_path / "config.yaml", config)
    words = [word.replace("OTHER", str(tmp_path / "OTHER")).replace("OWN", str(tmp_path / "OWN")) for word in typed]
    words = [f"run={tmp_path}", *words]
    composed = compose.compose("predict", [f"++{word}" for word in words])
    found = compose.overlay(composed, words).data.image_root
    assert found == (f"/{root}" if root == "ROOT" else root)


# ---------------------------------------------------------------- repeated rows

REPEATED = "image_path,question,answer\n0.png,what?,red\n0.png,what?,blue\n0.png,what?,red\n1.png,what?,red\n"


def test_repeated_rows_are_kept_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder / "one" / "a.csv", REPEATED)
    with caplog.at_level(logging.INFO, "vlmtune"):
        assert len(split(path)) == 4
    [line] = [record.getMessage() for record in caplog.records if "repeat" in record.getMessage()]
    assert "1 of 4 rows repeat an earlier one" in line
    assert f"{path}, line 4, row 3 is a duplicate of line 2, row 1" in line
    assert "data.on_duplicate=drop" in line


def test_repeated_rows_are_left_out_and_listed(folder: Path) -> None:
    """They are no bad rows: neither data.on_bad_row nor data.max_bad_fraction counts them."""
    path = write(folder / "one" / "a.csv", REPEATED)
    found = split(path, on_duplicate="drop", max_bad_fraction=0)
    assert [record.row for record in found.records] == [0, 1, 3]
    assert [(row.line, row.reason) for row in found.bad] == [(4, "duplicate of line 2, row 1")]


def test_repeated_rows_stop_the_run_where_that_is_asked_for(folder: Path) -> None:
    path = write(folder / "one" / "a.csv", REPEATED)
    with pytest.raises(BadRowsError) as caught:
        split(path, on_duplicate="fail")
    assert "line 4, row 3: duplicate of line 2, row 1" in str(caught.value)
    assert "data.on_duplicate=keep" in str(caught.value)
    assert [row.line for row in caught.value.bad] == [4]


def test_a_row_repeated_in_another_file_names_both(folder: Path) -> None:
    a = write(folder / "one" / "a.csv", "image_path,question,answer\n0.png,what?,red\n")
    b = write(folder / "two" / "b.csv", "image_path,question,answer\n2.png,what?,red\n../one/0.png,what?,red\n")
    with pytest.raises(BadRowsError) as caught:
        split(a, b, on_duplicate="fail")
    assert f"line 3, row 2: duplicate of {a}, line 2, row 1" in str(caught.value)


def test_repeats_of_records_are_not_looked_for_so_the_key_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.on_duplicate"):
        load(DataConfig(_target_="vlmtune.data.sources.drawn.courses.load", on_duplicate="drop"), TaskConfig(), 0)


# ---------------------------------------------------------------- lists in objects

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 70, "file_name": "0.png", "height": 4}, {"id": 7, "file_name": "1.png", "height": 4}],
    "annotations": [{"image_id": 7, "id": 1, "caption": "a cat"}, {"image_id": 70, "id": 2, "caption": "a dog"}],
}


def test_captions_in_cocos_form_are_read_with_their_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder / "one" / "captions.json", json.dumps(COCO))
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert f"{path}:annotations (2 rows)" in str(caught.value)
    with caplog.at_level(logging.INFO, "vlmtune"):
        frame = read_table(f"{path}:annotations")
    assert frame[["file_name", "caption", "image_id", "id"]].to_numpy().tolist() == [
        ["1.png", "a cat", "7", "1"],
        ["0.png", "a dog", "70", "2"],
    ]
    assert "not read: info" in caplog.text


def test_a_list_in_an_object_is_a_split(folder: Path) -> None:
    rows = [{"img": "0.png", "question": "what?", "answer": "red"}]
    path = write(folder / "one" / "t.json", json.dumps({"version": 1, "data": rows}))
    found = split(f"{path}:data", columns=ColumnsConfig(image="img"))
    assert found.records[0].place == f"{path}, row 1"
    assert found.records[0].images == (folder / "one" / "0.png",)


def test_the_advice_for_questions_and_answers_in_two_files_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VQAv2's pair: the lines of the message, run as they stand."""
    name = "COCO_train2014_000000000042.jpg"
    Image.new("RGB", (4, 4)).save(folder / name)
    questions = {"questions": [{"image_id": 42, "question": "What?", "question_id": 5}]}
    answers = [{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]
    annotations = {"annotations": [{"question_id": 5, "image_id": 42, "answers": answers, "answer_type": "other"}]}
    files = {
        "QUESTIONS": write(folder / "q.json", json.dumps(questions)),
        "ANNOTATIONS": write(folder / "a.json", json.dumps(annotations)),
    }
    with pytest.raises(DataError) as caught:
        read_table(files["QUESTIONS"])
    monkeypatch.chdir(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    exec("\n".join(lines), dict(files))
    found = split(str(folder / "train.jsonl"))
    assert (found.records[0].question, found.records[0].answers) == ("What?", ("red", "dark red"))
    assert found.records[0].images == (folder / name,)
