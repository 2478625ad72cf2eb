"""Values reach the model and predictions.csv as they are written: no detour through floats, Python's forms, indices."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tiny
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.audit import audit_frame
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.cells import from_json, to_json
from vlmtune.data.splits import Split
from vlmtune.data.table import load
from vlmtune.errors import DataError
from vlmtune.record.runfolder import write_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        tiny.image(seed=number).save(tmp_path / f"{number}.png")
    return tmp_path


def of_frame(folder: Path, answers: Any, **data: Any) -> Split:
    columns = {"image_path": [f"{n}.png" for n in range(len(answers))], "question": "What?", "answer": answers}
    return audit_frame(pd.DataFrame(columns), DataConfig(image_root=str(folder), **data), TaskConfig())


def of_json(folder: Path, answer: str, **data: Any) -> Split:
    path = folder / "t.json"
    path.write_text(f'[{{"image_path": "0.png", "question": "What?", "answer": {answer}}}]', encoding="utf-8")
    return load(DataConfig(train=str(path), **data), TaskConfig(), 0)["train"]


def answers(split: Split) -> list[tuple[str, ...]]:
    return [record.answers for record in split.records]


# ---------------------------------------------------------------- JSON

AS_WRITTEN = [
    ("1.50", "1.50"),
    ("1e3", "1e3"),
    ("-0", "-0"),
    ("12345678901234567890", "12345678901234567890"),
    ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ("9" * 5000, "9" * 5000),
    ("true", "true"),
    ("false", "false"),
    ('"True"', "True"),
    ('{"total": 12.50, "paid": true, "by": null}', '{"total": 12.50, "paid": true, "by": null}'),
    ('{"größe": ["S", 1.0]}', '{"größe": ["S", 1.0]}'),
    ("[12, 40.0]", "[12, 40.0]"),
    ('[["a", 1]]', '[["a", 1]]'),
]


@pytest.mark.parametrize(("written", "text"), AS_WRITTEN)
def test_json_keeps_what_stands_in_the_file(folder: Path, written: str, text: str) -> None:
    split = of_json(folder, written)
    assert answers(split) == [(text,)]
    assert split.frame is not None
    write_table(folder / "out.csv", split.frame)
    table = pd.read_csv(folder / "out.csv", dtype=str, keep_default_na=False)
    assert table["answer"].tolist() == [text], "predictions.csv has the input's own value"


def test_a_question_and_a_message_keep_their_numbers_too(folder: Path) -> None:
    rows = [f'{{"image_path": "0.png", "question": {written}, "answer": "a"}}' for written in ("2.50", "false")]
    (folder / "q.jsonl").write_text("\n".join(rows))
    found = load(DataConfig(train=str(folder / "q.jsonl")), TaskConfig(), 0)["train"].records
    assert [record.question for record in found] == ["2.50", "false"]
    told = '{"messages": [{"role": "user", "content": 1.0}, {"role": "assistant", "content": 3.10}]}'
    (folder / "m.jsonl").write_text(told)
    columns = ColumnsConfig(image="images", conversation="messages")
    [record] = load(DataConfig(train=str(folder / "m.jsonl"), columns=columns), TaskConfig(), 0)["train"].records
    assert (record.question, record.answers) == ("1.0", ("3.10",))


@pytest.mark.parametrize("text", ["[1, [2.0, {}], null, true]", '{"a": "\\"", "b": [-1e-7]}'])
def test_json_goes_round(text: str) -> None:
    assert to_json(from_json(text)) == text


# ---------------------------------------------------------------- frames in memory


class Color(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


class Word(str, enum.Enum):  # noqa: UP042
    YES = "yes"


IN_MEMORY = [
    (np.float32(0.1), "0.1"),
    (np.int64(7), "7"),
    (np.bool_(True), "true"),
    (False, "false"),
    (np.str_("red"), "red"),
    (decimal.Decimal("1.50"), "1.50"),
    (decimal.Decimal("0E-8"), "0.00000000"),
    (datetime.date(2024, 1, 2), "2024-01-02"),
    (datetime.time(9, 5), "09:05:00"),
    (pd.Timestamp("2024-01-02 03:04:05"), "2024-01-02 03:04:05"),
    (np.datetime64("2024-01-02"), "2024-01-02"),
    (pd.Period("2024-01"), "2024-01"),
    (Color.RED, "red"),
    (Size.SMALL, "1"),
    (Word.YES, "yes"),
    (b"caf\xc3\xa9", "café"),
    ({"n": np.float32(0.1), "ok": True, "at": datetime.date(2024, 1, 2)}, '{"n": 0.1, "ok": true, "at": "2024-01-02"}'),
    (np.array([1, 2]), "[1, 2]"),
    ((1, None), "[1, null]"),
]


@pytest.mark.parametrize(("value", "text"), IN_MEMORY)
def test_a_value_in_memory_becomes_its_text(folder: Path, value: Any, text: str) -> None:
    cells = pd.Series([None, None], dtype=object)
    cells[0] = value
    split = of_frame(folder, cells)
    assert answers(split) == [(text,)]
    assert [bad.reason for bad in split.bad] == ["empty answer"]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pd.Series([0.1, 3], dtype="float32"), ["0.1", "3.0"]),
        (pd.Series([1, None], dtype="Int64"), ["1"]),
        (pd.Series([True, None], dtype="boolean"), ["true"]),
        (pd.Categorical.from_codes([1, -1], [7, 8]), ["8"]),
        (pd.to_datetime(["2024-01-02", None]), ["2024-01-02 00:00:00"]),
    ],
)
def test_a_typed_column_takes_no_detour(folder: Path, column: Any, texts: list[str]) -> None:
    assert answers(of_frame(folder, column)) == [(text,) for text in texts]


@pytest.mark.parametrize("value", [None, float("nan"), pd.NA, pd.NaT, np.float32("nan"), "  ", []])
def test_what_is_missing_is_no_answer(folder: Path, value: Any) -> None:
    assert [bad.reason for bad in of_frame(folder, pd.Series([value], dtype=object)).bad] == ["empty answer"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (object(), "answer is object"),
        (b"\xff", "answer is bytes that are not UTF-8"),
        (tiny.image(), "answer is Image"),
    ],
)
def test_what_has_no_text_is_a_bad_row(folder: Path, value: Any, fault: str) -> None:
    assert fault in of_frame(folder, pd.Series([value], dtype=object)).bad[0].reason


# ---------------------------------------------------------------- lists of texts


def test_a_list_of_texts_is_references_or_the_answer_itself(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cells = pd.Series([["cup", "lamp"], '["cup", "lamp"]', "cup"], dtype=object)
    assert answers(of_frame(folder, cells)) == [("cup", "lamp"), ("cup", "lamp"), ("cup",)]
    said = "answers that are lists of texts: 2; the first text is trained on"
    assert said in caplog.text
    assert "data.answer_lists=text" in caplog.text
    caplog.clear()
    assert answers(of_frame(folder, cells, answer_lists="text")) == [('["cup", "lamp"]',)] * 2 + [("cup",)]
    assert "lists of texts: 2; the whole list is trained on" in caplog.text
    caplog.clear()
    of_frame(folder, ["[12, 40]", "cup"])
    assert not caplog.records, "nothing is said where there is one reading alone"


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        (["cup", None], "a null in it"),
        ([{"answer": "net", "answer_id": 1}], r"objects with an answer each \(VQA v2\)"),
        ("['cup', 'lamp']", "answer is a Python list"),
        (["cup", " "], "one in the list is blank"),
    ],
)
def test_a_list_that_may_be_either_is_asked_about(folder: Path, cell: Any, fault: str) -> None:
    cells = pd.Series([cell], dtype=object)
    [bad] = of_frame(folder, cells).bad
    assert re.search(fault, bad.reason)
    assert len(of_frame(folder, cells, answer_lists="text")) == 1


def test_a_python_list_of_images_says_what_to_write(folder: Path) -> None:
    frame = pd.DataFrame({"image_path": ["['0.png', '1.png']"], "question": ["Equal?"], "answer": ["no"]})
    split = audit_frame(frame, DataConfig(image_root=str(folder)), TaskConfig())
    assert split.bad[0].reason.startswith("image is a Python list")


# ---------------------------------------------------------------- typed files


def parquet(folder: Path, **columns: Any) -> Split:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    count = len(next(iter(columns.values())))
    table = pa.table({"image_path": [f"{n}.png" for n in range(count)], "question": ["What?"] * count, **columns})
    files.write_table(table, folder / "t.parquet")
    found = load(DataConfig(train=str(folder / "t.parquet"), on_bad_row="drop", max_bad_fraction=1), TaskConfig(), 0)
    return found["train"]


def test_parquet_keeps_its_types(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    day = datetime.date(2024, 1, 2)
    for column, texts in (
        (pa.array([2**53 + 1, None], pa.int64()), [str(2**53 + 1)]),
        (pa.array([0.1, 1e20], pa.float32()), ["0.1", "1e+20"]),
        (pa.array([0.1], pa.float16()), ["0.1"]),
        (pa.array([decimal.Decimal("1.50")], pa.decimal128(9, 2)), ["1.50"]),
        (pa.array([day]), ["2024-01-02"]),
        (pa.array([True, None]), ["true"]),
        (pa.array(["a", None, "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([b"caf\xc3\xa9"], pa.binary()), ["café"]),
        (
            pa.array([{"x": 0.1, "ok": True}], pa.struct([("x", pa.float32()), ("ok", pa.bool_())])),
            ['{"x": 0.1, "ok": true}'],
        ),
        (pa.array([[0.1, 2]], pa.list_(pa.float32())), ["[0.1, 2.0]"]),
    ):
        split = parquet(folder, answer=column)
        assert answers(split) == [(text,) for text in texts]
        assert split.frame is not None
        write_table(folder / "out.csv", split.frame)
        written = pd.read_csv(folder / "out.csv", dtype=str)["answer"].dropna().tolist()
        assert written == texts or column.type == pa.binary()


def labelled(folder: Path, labels: list[Any], feature: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [str(folder / f"{n}.png") for n in range(len(labels))],
        "question": ["What?"] * len(labels),
        "label": labels,
        "score": [0.1] * len(labels),
    }
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "question": text, "label": feature, "score": datasets.Value("float32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


HUB: dict[str, Any] = {
    "_target_": "vlmtune.data.sources.hub.load",
    "columns": ColumnsConfig(image="image", answer="label"),
    "on_bad_row": "drop",
    "max_bad_fraction": 0.9,
}


def test_classes_are_trained_on_by_name(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["cat", "dog"])
    labelled(folder, [1, 0, -1, None], classes).save_to_disk(str(folder / "set"))
    split = load(DataConfig(train=str(folder / "set"), **HUB), TaskConfig(), 0)["train"]
    assert answers(split) == [("dog",), ("cat",)]
    assert [bad.reason for bad in split.bad] == ["answer is class -1, and the 2 classes are cat, dog", "empty answer"]
    records: Any = split.records
    assert records.frame()["label"].tolist() == ["dog", "cat"]
    assert str(records.frame()["score"][0]) == "0.1"
    assert answers(Split(pickle.loads(pickle.dumps(records)))) == [("dog",), ("cat",)], "loaders' processes read too"


def test_a_set_that_was_read_as_tensors_is_read_as_values(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = labelled(folder, [1, 0], datasets.ClassLabel(names=["cat", "dog"])).with_format("numpy", columns=["label"])
    table.save_to_disk(str(folder / "set"))
    assert answers(load(DataConfig(train=str(folder / "set"), **HUB), TaskConfig(), 0)["train"]) == [("dog",), ("cat",)]


def test_classes_in_lists_are_names_too(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.List(datasets.ClassLabel(names=["cat", "dog"]))
    labelled(folder, [[1, 0], [0], [-1]], classes).save_to_disk(str(folder / "set"))
    split = load(DataConfig(train=str(folder / "set"), **HUB), TaskConfig(), 0)["train"]
    assert answers(split) == [("dog", "cat"), ("cat",)]
    assert "answer is class -1" in split.bad[0].reason


def test_an_unread_label_without_a_name_is_no_fault(folder: Path) -> None:
    """Test sets carry -1 for what is kept secret."""
    datasets = pytest.importorskip("datasets")
    labelled(folder, [-1], datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(str(folder / "set"))
    config = DataConfig(train=str(folder / "set"), **{**HUB, "columns": ColumnsConfig(image="image", answer="score")})
    records: Any = load(config, TaskConfig(), 0)["train"].records
    assert answers(Split(records)) == [("0.1",)]
    assert records.frame()["label"].tolist() == ["-1"]


def test_a_prediction_of_rows_with_a_secret_label(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    labelled(folder, [-1], datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(str(folder / "set"))
    found = load(DataConfig(test=str(folder / "set"), **HUB), TaskConfig(), 0, ("test",), answers_required=False)
    assert len(found["test"]) == 1


def test_a_parquet_file_of_a_data_set_knows_its_classes(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    labelled(folder, [1, 0], datasets.ClassLabel(names=["cat", "dog"])).to_parquet(str(folder / "set.parquet"))
    config = DataConfig(train=str(folder / "set.parquet"), columns=ColumnsConfig(image="image", answer="label"))
    assert answers(load(config, TaskConfig(), 0)["train"]) == [("dog",), ("cat",)]


def test_columns_of_a_data_set_are_refused_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    caplog.set_level(logging.INFO)
    table = labelled(folder, [1, 0], datasets.ClassLabel(names=["cat", "dog"]))
    table.add_column("bbox", [None, [1, 2, 3, 4]]).save_to_disk(str(folder / "set"))
    split = load(DataConfig(train=str(folder / "set"), **HUB), TaskConfig(), 0)["train"]
    assert [bad.row for bad in split.bad] == [2]
    assert "column 'bbox' holds positions in the image: [1, 2, 3, 4]" in split.bad[0].reason
    assert "columns not read: score" in caplog.text
    caplog.clear()
    stream = {**HUB, "streaming": True, "shuffle_buffer": 1}
    records = load(DataConfig(train=str(folder / "set"), **stream), TaskConfig(), 0)["train"].records
    assert records[0].answers == ("dog",)
    assert records[1].answers == ("dog",), "the second row is left out, and the first comes again"
    assert "skipped" in caplog.text


def test_a_data_sets_questions_are_asked_for(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = labelled(folder, [1, 0], datasets.ClassLabel(names=["cat", "dog"])).rename_column("question", "ask")
    table.save_to_disk(str(folder / "set"))
    for more in ({}, {"streaming": True}):
        with pytest.raises(DataError, match="no column 'question'; unused columns with texts: ask"):
            load(DataConfig(train=str(folder / "set"), **HUB, **more), TaskConfig(), 0)


def test_a_json_list_in_a_text_keeps_its_writing(folder: Path) -> None:
    """A cell of a CSV is a text, spaces and all."""
    cell = '{"total":12.50,  "items": ["a"]}'
    (folder / "t.csv").write_text(f"image_path,question,answer\n0.png,What?,{json.dumps(cell)}\n".replace('\\"', '""'))
    assert answers(load(DataConfig(train=str(folder / "t.csv")), TaskConfig(), 0)["train"]) == [(cell,)]


def test_a_number_is_no_path(folder: Path) -> None:
    (folder / "t.jsonl").write_text('{"image_path": 7, "question": "What?", "answer": "a"}')
    with pytest.raises(BadRowsError, match="not an image: the cell is a number"):
        load(DataConfig(train=str(folder / "t.jsonl")), TaskConfig(), 0)
