"""Public data sets in the form in which they are published: what reaches the records, or what the error says to set."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.splits import Split
from vlmtune.data.table import load
from vlmtune.errors import DataError

Named = ColumnsConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png", "2354786.jpg", "0054c91397f2fe05.jpg", "COCO_val2014_000000000042.jpg"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def read(folder: Path, content: Any, key: str = "", name: str = "t.json", task: str = "vqa", **config: Any) -> Split:
    """The training split of a file with this content: a text, or what is written as JSON."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return load(DataConfig(train=f"{folder / name}{key}", **config), TaskConfig(name=task), 0)["train"]


def said(split: Split) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """Question, answers and names of the images of each record."""
    return [(r.question, r.answers, [i.name for i in r.images if isinstance(i, Path)]) for r in split.records]


def fault(folder: Path, content: Any, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, content, **config)
    return str(caught.value)


GQA = {
    "02930152": {"question": "Is it dark?", "imageId": "2354786", "answer": "yes", "annotations": {"answer": {}}},
    "07333408": {"question": "Who?", "imageId": "2354786", "answer": "man", "annotations": {"answer": {"0": "1"}}},
}
SCIENCE = {
    "1": {"question": "Which?", "choices": ["x", "y"], "answer": 0, "image": "0.png"},
    "2": {"question": "Where?", "choices": ["x", "y"], "answer": 1, "image": None},
}
TEXTVQA = {
    "dataset_type": "train",
    "data": [
        {"question": "brand?", "image_id": "0054c91397f2fe05", "answers": ["nokia", "toshiba"], "question_id": 0},
    ],
}
AOKVQA = [{"image_id": 42, "question_id": "22T", "question": "What?", "direct_answers": ["a", "b"]}]


def test_rows_of_an_object_are_read_by_their_keys(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vlmtune"):
        found = read(folder, GQA, columns=Named(image="imageId"), image_name="{}.jpg")
    assert said(found) == [("Is it dark?", ("yes",), ["2354786.jpg"]), ("Who?", ("man",), ["2354786.jpg"])]
    assert found.frame is not None
    assert found.frame["key"].tolist() == ["02930152", "07333408"]
    assert "its keys are the column 'key'" in caplog.text
    science = read(folder, SCIENCE, columns=Named(image="image"), ignore=["choices"])
    assert said(science) == [("Which?", ("0",), ["0.png"]), ("Where?", ("1",), [])]
    under = read(folder, {"info": 1, "train": SCIENCE}, key=":train", columns=Named(image="image"), ignore=["choices"])
    assert said(under) == said(science)


def test_images_are_named_by_what_the_cell_holds(folder: Path) -> None:
    columns = Named(image="image_id", answer="answers")
    found = read(folder, TEXTVQA, key=":data", columns=columns, image_name="{}.jpg")
    assert said(found) == [("brand?", ("nokia", "toshiba"), ["0054c91397f2fe05.jpg"])]
    columns = Named(image="image_id", answer="direct_answers")
    found = read(folder, AOKVQA, columns=columns, image_name="COCO_val2014_{:012d}.jpg")
    assert said(found) == [("What?", ("a", "b"), ["COCO_val2014_000000000042.jpg"])]
    table = "image_path,question,answer\n42,q,a\n"
    assert said(read(folder, table, name="t.csv", image_name="COCO_val2014_{:012d}.jpg")) == [
        ("q", ("a",), ["COCO_val2014_000000000042.jpg"])
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["the cell is a number (42)", "data.image_name={}.jpg"]),
        ({"image_name": "x.jpg"}, ["data.image_name=x.jpg: needs exactly one placeholder"]),
        ({"image_name": "{}{}.jpg"}, ["one placeholder"]),
        ({"image_name": "{a}.jpg"}, ["one placeholder"]),
        ({"image_name": "{:q}.jpg"}, ["one placeholder"]),
    ],
)
def test_a_number_in_place_of_an_image_says_what_to_set(folder: Path, config: Any, words: list[str]) -> None:
    message = fault(folder, AOKVQA, columns=Named(image="image_id", answer="direct_answers"), **config)
    assert all(word in message for word in words), message


def test_a_name_without_its_ending_says_what_to_set(folder: Path) -> None:
    message = fault(folder, GQA, columns=Named(image="imageId"))
    assert "did you mean 2354786.jpg? For a column of such names: data.image_name={}.jpg" in message
    rows = [{"image_path": "cat", "question": "q", "answer": "a"}]
    message = fault(folder, rows, image_name="{:06d}.jpg")
    assert "'cat' is not a whole number, which data.image_name={:06d}.jpg needs" in message


@pytest.mark.parametrize("key", ["", ":annotations"])
def test_half_of_a_pair_of_files_says_how_to_join_them(folder: Path, key: str) -> None:
    half = {"annotations": [{"image_id": 9, "answers": [{"answer": "x"}], "question_id": 91}]}
    assert "questions and answers are in two files" in fault(folder, half, key=key)
    assert "t.json:data (1 rows)" in fault(folder, TEXTVQA)  # holds both


def test_rows_that_are_nested_deeper_are_not_taken_for_rows_by_key(folder: Path) -> None:
    content = {"dataset": {"train": [{"image_path": "0.png", "question": "q", "answer": "a"}]}}
    assert "put a list of rows that is deeper inside into a separate file" in fault(folder, content)


def test_the_two_halves_of_a_conversation_are_named(folder: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    message = fault(folder, [row], columns=Named(image="images", conversation="messages"))
    assert "join their lists in one column" in message


def test_columns_in_place_of_rows_are_named_so(folder: Path) -> None:
    lists = {"image_path": ["0.png", "1.png"], "question": ["a", "b"], "answer": ["x", "y"]}
    by_index = {name: dict(enumerate(cells)) for name, cells in lists.items()}
    for content in (lists, by_index):
        assert "holds columns, not rows" in fault(folder, content)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"image_id": 9, "file_name": "0.png", "caption": "x"}, "file_name"),
        ({"image_url": "https://x.org/0.png", "image_local_name": "0.png"}, "image_local_name"),
        ({"imageId": "2354786", "image_width": 10}, "imageId"),
        ({"image_pth": "0.png", "image_id": "1"}, "image_pth"),
    ],
)
def test_the_column_that_most_likely_holds_the_images_is_suggested(folder: Path, row: Any, column: str) -> None:
    assert f"try data.columns.image={column};" in fault(folder, [{**row, "question": "q", "answer": "a"}])


def test_a_second_image_beside_the_first_is_refused(folder: Path) -> None:
    row = {"sentence": "Equal?", "left": "0.png", "right": "1.png", "label": "True"}
    columns = Named(image="left", question="sentence", answer="label")
    assert "column 'right' holds another image of the row" in fault(folder, [row], columns=columns)
    assert len(read(folder, [{**row, "right": "the right side"}], columns=columns)) == 1


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("clip", "a.MP4", 0.31),
        ("speech", "a.wav", "said loudly"),
        ("frames", ["0.png", "1.png"], 16),
        ("xyxy", [1, 2, 3, 4], None),
        ("prompt_weight", 0.1, 1),
        ("enable_thinking", False, None),
        ("mm_processor_kwargs", {"max_pixels": 9}, {}),
        ("documents", [{"text": "x"}], "3 pages"),
    ],
)
def test_columns_that_change_a_row_are_refused_where_they_do(
    folder: Path, name: str, value: Any, harmless: Any
) -> None:
    row = {"image_path": "0.png", "question": "q", "answer": "a"}
    assert f"column {name!r} holds" in fault(folder, [{**row, name: value}])
    assert len(read(folder, [{**row, name: harmless}])) == 1


@pytest.mark.parametrize(
    ("asked", "answered", "words"),
    [
        ({}, {"mask": 0}, "'mask' holds whether an answer is trained on"),
        ({}, {"train_on": False}, "write it as weight: 0 or 1"),
        ({}, {"tool_plan": "look"}, "'tool_plan' holds tools"),
        ({"rotate": 90}, {}, "an image's 'rotate' holds a transformation of an image: 90"),
        ({"max_tiles": 4}, {}, "an image's 'max_tiles' holds a size per image"),
    ],
)
def test_keys_of_messages_and_images_that_change_a_row_are_refused(
    folder: Path, asked: Any, answered: Any, words: str
) -> None:
    parts = [{"type": "image", "image": "0.png", **asked}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a", **answered}]}
    assert words in fault(folder, [row], columns=Named(image="images", conversation="messages"))


def test_a_kind_of_fault_is_named_by_words(folder: Path) -> None:
    rows = [{"image_path": "0.png", "question": "<image><image>Equal?", "answer": "a"}]
    assert "(1 x placeholders and images differ)" in fault(folder, rows)
    messages = [
        {"role": "user", "content": [{"type": "image", "base64": "aGk="}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a"},
    ]
    message = fault(folder, [{"messages": messages}], columns=Named(image="images", conversation="messages"))
    assert "(1 x an image's 'base64' holds an image's content)" in message


def test_cells_that_bars_separate_say_how_to_convert_them(folder: Path) -> None:
    text = "image_name| comment_number| comment\n0.png| 0| Two men .\n"
    assert "sep='|', skipinitialspace=True" in fault(folder, text, name="t.csv", task="caption")
