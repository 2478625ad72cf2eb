"""Columns and keys: what nothing reads is named, and what changes the meaning of a row is read or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tiny
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.audit import audit_frame
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import Split
from vlmtune.data.table import load
from vlmtune.errors import DataError

CHAT = ColumnsConfig(image="images", conversation="messages")
LLAVA = ColumnsConfig(image="image", conversation="conversations")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        tiny.image(seed=number).save(tmp_path / f"{number}.png")
    return tmp_path


def read(folder: Path, rows: list[dict[str, Any]], task: str = "vqa", **data: Any) -> Split:
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load(DataConfig(train=str(path), **data), TaskConfig(name=task), 0)["train"]


def question(**more: Any) -> dict[str, Any]:
    return {"image_path": "0.png", "question": "What?", "answer": "a cat", **more}


def messages(user: Any = "<image>\nWhat?", assistant: Any = "a cat", **of_answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant, **of_answer}]


def chat(folder: Path, told: list[dict[str, Any]], row: dict[str, Any] | None = None, **data: Any) -> Record:
    return read(folder, [{"images": ["0.png"], "messages": told, **(row or {})}], columns=CHAT, **data).records[0]


def reason(folder: Path, rows: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(BadRowsError) as caught:
        read(folder, rows, **data)
    return "; ".join(bad.reason for bad in caught.value.bad)


# ---------------------------------------------------------------- columns

REFUSED = [
    ("audios", ["a.wav"], "audio"),
    ("video_url", "https://x/y.mp4", "a video"),
    ("Videos", ["a.mp4"], "a video"),
    ("rejected_response", "a dog", "preference data"),
    ("kto_tag", True, "preference data"),
    ("label", False, "preference data"),
    ("chosen", [{"role": "user", "content": "a"}], "preference data"),
    ("tools", '[{"name": "zoom"}]', "tools"),
    ("sample_weight", 0.5, "a row weight"),
    ("weight", 0, "a row weight"),
    ("bboxes", [[0, 0, 4, 4]], "positions in the image"),
    ("objects", {"ref": ["cat"], "bbox": [[0, 0, 4, 4]]}, "positions in the image"),
    ("points", "[[3, 4]]", "positions in the image"),
    ("max_pixels", 1003520, "a size per image"),
    ("history", [["Who?", "me"]], "earlier turns"),
    ("thinking", "It has fur.", "the reasoning before an answer"),
    ("image_2", "1.png", "another image of the row"),
    ("system_prompt", "Be brief.", r"a system prompt.*data\.columns\.system="),
    ("chat_template_kwargs", {"enable_thinking": True}, "arguments for the chat template"),
    ("options", ["a cat", "a dog"], "multiple-choice options"),
]


@pytest.mark.parametrize(("name", "value", "meaning"), REFUSED)
def test_a_column_that_changes_a_row_refuses_exactly_that_row(
    folder: Path, name: str, value: Any, meaning: str
) -> None:
    rows = [question(), question(question="Who?", **{name: value})]
    with pytest.raises(BadRowsError, match=rf"column '{name}' holds {meaning}.*data\.ignore=\[{name}\]") as caught:
        read(folder, rows)
    assert [bad.row for bad in caught.value.bad] == [2]
    kept = read(folder, rows, on_bad_row="drop", max_bad_fraction=0.5)
    assert [record.question for record in kept.records] == ["What?"]


@pytest.mark.parametrize("value", [None, "", "  ", [], {}, [None], {"bbox": None}])
def test_an_empty_value_changes_nothing_and_is_silent(
    folder: Path, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert len(read(folder, [question(bbox=value, videos=value, tools=value, name=value)])) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 1),
        ("sample_weight", 1.0),
        ("objects", "cup, table"),
        ("points", 5),
        ("label", "cat"),
        ("crop", "maize"),
    ],
)
def test_a_value_that_means_nothing_here_is_no_fault(folder: Path, name: str, value: Any) -> None:
    assert len(read(folder, [question(**{name: value})])) == 1


def test_what_is_left_unread_on_purpose(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert len(read(folder, [question(bbox=[1, 2, 3, 4], rejected="b")], ignore=["bbox", "rejected"])) == 1
    told = messages(reasoning_content="Fur.", audio={"id": "a"})
    assert chat(folder, told, ignore=["reasoning_content", "audio"]).answers == ("a cat",)
    assert "not read" not in caplog.text, "who names them knows it"


def test_what_is_read_can_not_be_ignored() -> None:
    from vlmtune.config.together import combinations

    config = tiny.config("somewhere")
    config.data = DataConfig(ignore=["question", "bbox"])
    assert combinations(config) == [
        "data.ignore: question is the column that data.columns.question reads; remove it from one of them"
    ]


def test_what_nothing_reads_is_named_once_a_split(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(folder, [question(id=1, category="animals", note=None), question(id=2, answer="a dog")])
    assert [record.getMessage() for record in caplog.records] == [f"{folder}/t.jsonl: columns not read: id, category"]
    caplog.clear()
    told = [
        {"role": "user", "content": "<image>\nWhat?", "name": "Ann"},
        {"role": "assistant", "content": "a", "ts": 3},
    ]
    read(
        folder, [{"images": ["0.png"], "messages": told}] * 1 + [{"images": ["1.png"], "messages": told}], columns=CHAT
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/t.jsonl: keys of messages not read: name, ts"
    ]


def test_a_prediction_is_refused_for_its_prompt_alone(folder: Path) -> None:
    frame = pd.DataFrame([question(rejected="a dog", bbox=[1, 2, 3, 4]), question(video="a.mp4")])
    split = audit_frame(frame, DataConfig(image_root=str(folder)), TaskConfig(), answers_required=False)
    assert [record.row for record in split.records] == [0]
    assert "'video' holds a video" in split.bad[0].reason


def test_a_system_prompt_of_the_rows_own(folder: Path) -> None:
    assert chat(folder, messages(), {"system": "Be brief."}).system == "Be brief."
    assert chat(folder, messages(), {"system": " "}).system is None
    assert read(folder, [question(system="Be brief.")]).records[0].system == "Be brief."
    assert (
        read(folder, [question(rule="Be kind.")], columns=ColumnsConfig(system="rule")).records[0].system == "Be kind."
    )
    same = [{"role": "system", "content": "Be brief."}, *messages()]
    assert chat(folder, same, {"system": "Be brief."}).system == "Be brief."
    with pytest.raises(BadRowsError, match="two system prompts"):
        chat(folder, same, {"system": "Be kind."})
    with pytest.raises(BadRowsError, match=r"column 'system' holds a system prompt"):
        read(folder, [question(system="Be brief.")], columns=ColumnsConfig(system=None))


# ---------------------------------------------------------------- messages

IMAGE = {"type": "image", "image": "1.png"}
TEXT = {"type": "text", "text": "What?"}


def shown(**more: Any) -> list[dict[str, Any]]:
    return [{**IMAGE, **more}, TEXT]


BAD_MESSAGES = [
    (messages(thinking="Fur."), "message 2: 'thinking' holds the reasoning before an answer"),
    (messages(function_call={"name": "zoom"}), "message 2: 'function_call' holds tools"),
    (messages(weight=0.5), "message 2: weight 0.5: must be 0 or 1"),
    (messages(loss="half"), "message 2: loss half: must be 0 or 1"),
    (messages(refusal="I can't."), "message 2: 'refusal' holds a refusal"),
    (messages(weight=0), "no answer to train on: each has weight 0"),
    ([{**messages()[0], "loss": True}, messages()[1]], "message 1: loss True: only answers are trained on"),
    ([{**messages()[0], "images": ["1.png"]}, messages()[1]], "message 1: 'images' holds images in a message"),
    ([*messages(), {"role": "observation", "content": "4"}], "message 3: role 'observation': tools are not supported"),
    (
        [{"role": "developer", "content": "s"}, *messages()],
        "'developer' is not supported; choose from: system, human, user",
    ),
    ([{"prompt": "What?", "reply": "a"}], "message 1: has no role: its keys are prompt, reply; expected role and"),
    ([{"user": "What?", "assistant": "a", "bbox": [1]}], "message 2: 'bbox' holds positions in the image"),
    ({"role": ["user", "assistant"], "content": ["What?"]}, "conversation is dict"),
    ([{"role": "user", "text": "What?"}], "message 1: has no content: its keys are role, text"),
    ([{"role": "user", "content": "a", "value": "b"}], "message 1: has both content and value"),
    ([{"role": "system", "content": "<image>"}, *messages()], "message 1: an image in a system prompt"),
    (messages(user={"text": "What?"}), "message 1: content is an object"),
    (messages(user=shown(min_pixels=3136)), r"an image's 'min_pixels' holds a size.*model\.image\.max_tokens"),
    (messages(user=shown(crop=[0, 0, 4, 4])), "an image's 'crop' holds a size per image"),
    (
        messages(user=[{"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}}, TEXT]),
        "an image's 'detail' holds a size per image: \"low\"",
    ),
    (messages(user=[{"type": "image", "source": {"data": "aGk="}}, TEXT]), "'source' holds an image's content"),
    (messages(user=[{"type": "input_audio", "input_audio": {}}, TEXT]), "a part of type 'input_audio'"),
    (messages(user=[{"type": "video", "video": "a.mp4"}, TEXT]), "a part of type 'video'"),
    (messages(user=["What?"]), "a part of type 'str'; supported are text, image and image_url"),
    (messages(user=[{**TEXT, "image": "1.png"}]), "a text part's 'image' holds an image in a text part"),
    (messages(user=[{**IMAGE, "image_url": "2.png"}, TEXT]), "a part with two images"),
    (messages(user=[{"type": "image", "index": 1}, TEXT]), "an image of index 1: .* 0 is next"),
    (messages(user="<video>\nWhat happens?"), "<video> is a placeholder for a video"),
    (messages(user="What do you hear?<audio>"), "<audio> is a placeholder for audio"),
    (messages(user=[{"type": "text", "text": "<image><image>Equal?"}]), r"2 x <image> for 1 images"),
    ("[" * 100_000, "conversation is nested too deeply"),
]


@pytest.mark.parametrize(("told", "fault"), BAD_MESSAGES)
def test_a_message_that_says_more_than_is_read_is_refused(folder: Path, told: Any, fault: str) -> None:
    with pytest.raises(BadRowsError, match=fault):
        chat(folder, told)


def test_answers_with_weight_0_are_left_out(folder: Path) -> None:
    told = [*messages(weight=0), *messages("Again.", "a dog", weight=1)]
    assert [turn.trained for turn in chat(folder, told, supervise="all").turns] == [False, True]
    spared = [*messages(), *messages("Again.", "a dog", loss=False)]
    assert [turn.trained for turn in chat(folder, spared, supervise="all").turns] == [True, False]
    with pytest.raises(BadRowsError, match=r"the last answer has weight 0: data\.supervise=all"):
        chat(folder, spared)


def test_an_answer_with_weight_0_has_no_labels(encoder_of: Any) -> None:
    from vlmtune.prompt.encode import Encoder

    encoder = Encoder(encoder_of("qwen2_vl").processor, supervise="all")
    turns = (Turn("What?", ("Red",), trained=False), Turn("Sure?", ("yes",)))
    assert encoder.supervised_texts(Record(turns, (tiny.image(),))) == ["yes<|im_end|>"]


@pytest.mark.parametrize(
    "user",
    [
        [{"image": "1.png"}, {"text": "What?"}],
        [{"type": "image", "index": 0, "text": None}, {"type": "text", "text": "What?", "index": None}],
        [{"type": "image_url", "image_url": {"url": "1.png", "detail": "auto"}}, TEXT],
        [{"type": "text", "text": "<image>\nWhat?"}],
    ],
)
def test_forms_that_other_programs_write_are_read(folder: Path, user: Any) -> None:
    own = "1.png" in json.dumps(user)
    record = read(folder, [{"images": None if own else ["0.png"], "messages": messages(user)}], columns=CHAT).records[0]
    assert record.turns == (Turn("What?", ("a cat",), (0,)),)
    assert [Path(str(image)).name for image in record.images] == ["1.png" if own else "0.png"]


def test_parts_of_sharegpt_stand_under_value_and_empty_keys_of_another_form_beside(folder: Path) -> None:
    told = [{"from": "human", "value": [IMAGE, TEXT], "content": None}, {"from": "gpt", "value": 42, "role": None}]
    record = read(folder, [{"conversations": told}], columns=LLAVA).records[0]
    assert record.turns == (Turn("What?", ("42",), (0,)),)


@pytest.mark.parametrize(
    "told",
    [
        [{"user": "<image>\nWhat?", "assistant": "a cat", "source": "x"}],
        [{"human": "<image>\nWhat?", "assistant": "a cat"}],
        {"role": ["user", "assistant"], "content": ["<image>\nWhat?", "a cat"]},
    ],
)
def test_pairs_and_lists_by_key_are_messages(folder: Path, told: Any) -> None:
    assert chat(folder, told).turns == (Turn("What?", ("a cat",), (0,)),)


# ---------------------------------------------------------------- marks in a table


@pytest.mark.parametrize(
    ("cell", "text", "wanted"),
    [
        ("0.png", "<image>\nWhat?", Turn("What?", ("a cat",), (0,))),
        ("0.png", "What is <video> in HTML?", Turn("What is <video> in HTML?", ("a cat",))),
        ("0.png", "<image> <image>Equal?", r"2 x <image> for 1 images"),
        (None, "<image>\nWhat?", r"1 x <image> for 0 images"),
        ("0.png", "<video>\nWhat?", "<video> is a placeholder for a video"),
    ],
)
def test_marks_in_a_table_are_places_or_faults(folder: Path, cell: Any, text: str, wanted: Any) -> None:
    row = question(image_path=cell, question=text)
    if isinstance(wanted, str):
        with pytest.raises(BadRowsError, match=wanted):
            read(folder, [row])
    else:
        assert read(folder, [row]).records[0].turns == (wanted,)


def test_a_column_of_videos_makes_every_mark_one(folder: Path) -> None:
    rows = [question(), question(question="Is it in <video> too?"), question(question="Who?", video="a.mp4")]
    assert reason(folder, rows).startswith("<video> is a placeholder for a video")


def test_another_programs_mark_stays_text_and_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    marks = ["<img>0.png</img>", "<image 1>", "<|image_1|>", "<image_placeholder>"]
    split = read(folder, [question(question=f"{mark} What?") for mark in marks])
    assert [record.question for record in split.records] == [f"{mark} What?" for mark in marks]
    assert "4 questions contain a marker such as <img>0.png</img>, which stays text" in caplog.text
    caplog.clear()
    read(folder, [question(question="What does <img> mean in HTML?")])
    assert not caplog.records


# ---------------------------------------------------------------- missing columns


def test_unnamed_questions_are_no_captions(folder: Path) -> None:
    """ChartQA's own keys, and whoever follows the errors: each row was trained as a caption."""
    rows = [{"imgname": "0.png", "query": "How many?", "label": "3", "id": "x"}]
    with pytest.raises(DataError) as caught:
        read(folder, rows)
    assert [problem.split("; try ")[1].split(";")[0] for problem in caught.value.problems] == [
        "data.columns.image=imgname",
        "data.columns.answer=label",
        "data.columns.question=query",
    ]
    named = ColumnsConfig(image="imgname", answer="label")
    with pytest.raises(
        DataError, match=r"unused columns with texts: query, id.*columns\.question=query.*task=caption or data\.col"
    ):
        read(folder, rows, columns=named)
    unlike = [{"image_path": "0.png", "ask": "How many?", "answer": "3"}]
    with pytest.raises(DataError, match=r"no column 'question'; unused columns with texts: ask; name it"):
        read(folder, unlike)


def test_captions_say_so(folder: Path) -> None:
    rows = [{"image_path": "0.png", "answer": "a cat", "id": "x"}]
    with pytest.raises(DataError, match="no column 'question'"):
        read(folder, rows)
    assert read(folder, rows, task="caption").records[0].question == "Describe the image."
    named = [{**rows[0], "question": "Who?"}]
    columns = ColumnsConfig(question=None)
    assert read(folder, named, columns=columns).records[0].question == "Describe the image."
    with pytest.raises(DataError, match=r"no column 'question'; .*query"):
        read(folder, [{**rows[0], "query": "How many?"}], task="caption")


def test_a_prediction_asks_for_its_questions_too(folder: Path) -> None:
    frame = pd.DataFrame({"image_path": [str(folder / "0.png")], "query": ["How many?"]})
    with pytest.raises(DataError, match=r"try data\.columns\.question=query"):
        audit_frame(frame, DataConfig(), TaskConfig(), answers_required=False)


def test_a_column_twice_in_a_frame(folder: Path) -> None:
    frame = pd.DataFrame([["0.png", "a?", "b?", "c"]], columns=["image_path", "question", "question", "answer"])
    with pytest.raises(DataError, match="2 columns are named 'question'"):
        audit_frame(frame, DataConfig(image_root=str(folder)), TaskConfig())


def test_the_columns_of_a_frame_may_have_numbers_for_names(folder: Path) -> None:
    frame = pd.DataFrame([["0.png", "What?", "a cat"]])
    columns = ColumnsConfig(image="0", question="1", answer="2")
    split = audit_frame(frame, DataConfig(columns=columns, image_root=str(folder)), TaskConfig())
    assert split.records[0].turns == (Turn("What?", ("a cat",)),)


def test_no_image_is_said_only_where_there_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    carried = {"messages": messages(user=[IMAGE, TEXT])}
    text = {"messages": messages(user="Say a", assistant="a")}
    read(folder, [carried, text], columns=CHAT)
    with pytest.raises(BadRowsError):
        read(folder, [{"messages": messages(user=[{"type": "image", "source": {"data": "x"}}, TEXT])}], columns=CHAT)
    assert not caplog.records
    read(folder, [text], columns=CHAT)
    assert "no column 'images', and none of the 1 usable rows has an image" in caplog.text


def test_an_alpaca_rows_second_half_is_not_dropped(folder: Path) -> None:
    columns = ColumnsConfig(question="instruction", answer="output")
    row = {"image_path": "0.png", "instruction": "Translate:", "input": "chat", "output": "cat"}
    assert "'input' holds the second half of an instruction" in reason(folder, [row], columns=columns)
    assert len(read(folder, [{**row, "input": ""}], columns=columns)) == 1
