"""Conversations and several images in a row: what stands in the file is what is asked, shown and learned."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tiny
from vlmtune import api
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.conversations import parse
from vlmtune.data.marks import placed
from vlmtune.data.records import Record, Turn
from vlmtune.data.table import load
from vlmtune.errors import DataError
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.labels import IGNORE
from vlmtune.proof.checks import check_labels
from vlmtune.proof.row_checker import Limits, RowChecker

LLAVA = ColumnsConfig(image="image", conversation="conversations")
OPENAI = ColumnsConfig(image="images", conversation="messages")


def chat(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        tiny.image(seed=number).save(tmp_path / f"{number}.png")
    return tmp_path


def records(folder: Path, rows: list[dict[str, Any]], columns: ColumnsConfig, name: str = "rows.json") -> list[Record]:
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return [*load(DataConfig(train=str(path), columns=columns), TaskConfig(), 0)["train"].records]


# ---------------------------------------------------------------- forms


def test_llavas_form(folder: Path) -> None:
    rows = [
        {"id": 7, "image": "0.png", "conversations": chat("<image>\nWhat is it?", "a cat", "And its color?", "red")}
    ]
    [record] = records(folder, rows, LLAVA)
    assert record.turns == (Turn("What is it?", ("a cat",), (0,)), Turn("And its color?", ("red",)))
    assert record.images == (folder / "0.png",)
    assert record.group == str(folder / "0.png")


def test_openais_form_with_images_of_its_own_and_of_the_row(folder: Path) -> None:
    content = io.BytesIO()
    tiny.image(seed=1).save(content, "PNG")
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image_url", "image_url": {"url": "0.png"}},
        {"type": "text", "text": " like "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "?"},
    ]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "no"},
            ]
        },
        {
            "images": ["1.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
            ],
        },
    ]
    own, of_row = records(folder, rows, OPENAI, "rows.jsonl")
    assert own.turns == (Turn("Is  like ?", ("no",), (3, 9)),)
    assert own.images == (folder / "0.png", content.getvalue())
    assert own.system == "Be brief."
    assert of_row.turns == (Turn("What?", ("a dog",), (0,)),)
    assert of_row.images == (folder / "1.png",)


def test_parquet_gives_the_same(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        {"image": "0.png", "conversations": chat("<image>\nWhat?", "a cat")},
        {"image": None, "conversations": chat("Say a", "a")},
    ]
    wanted = records(folder, rows, LLAVA)
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    found = load(DataConfig(train=str(folder / "rows.parquet"), columns=LLAVA), TaskConfig(), 0)["train"].records
    assert [(r.turns, r.images) for r in found] == [(r.turns, r.images) for r in wanted]


def test_json_lines_of_questions_and_answers_need_no_conversation(folder: Path) -> None:
    rows = [{"image_path": "0.png", "question": "What?", "answer": ["a cat", "cat"]}]
    [record] = records(folder, rows, ColumnsConfig(), "rows.jsonl")
    assert record.turns == (Turn("What?", ("a cat", "cat")),)


def test_a_column_that_looks_like_what_is_missing_is_named(folder: Path) -> None:
    rows = [{"image": "0.png", "messages": chat("What?", "a cat")}]
    with pytest.raises(DataError, match=r"no column 'answer'; for conversations use data=messages"):
        records(folder, rows, ColumnsConfig(image="image"))
    with pytest.raises(DataError, match=r"no column 'images'; try data\.columns\.image=image"):
        records(folder, rows, OPENAI)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (chat("a?"), "ends with a question"),
        (chat("a?", "  "), "message 2: empty answer"),
        ([{"from": "gpt", "value": "a"}], "message 1: an answer without a question"),
        ([*chat("a?"), *chat("b?", "b")], "message 2: two questions in a row"),
        ([{"from": "humans", "value": "a?"}], "message 1: role 'humans' is not supported; choose from: system, human"),
        ([{"role": "user", "content": [{"type": "video"}]}], "message 1: a part of type 'video'"),
        ([*chat("a?", "a"), {"from": "system", "value": "s"}], "message 3: a system prompt must come first"),
        (chat("a?", "<image>"), "message 2: an image in an answer"),
        (["a?"], "message 1: is str"),
        ([], "a list of messages is needed"),
        ("[", "is not JSON"),
        (None, "conversation is NoneType"),
    ],
)
def test_what_is_no_conversation_says_where(messages: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse(messages, answers_required=True)


def test_a_question_at_the_end_is_what_prediction_answers() -> None:
    found = parse(chat("a?", "a", "b?"), answers_required=False)
    assert found.turns == (Turn("a?", ("a",)), Turn("b?"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What?", ("What?", ())),
        ("<image>\nWhat?", ("What?", (0,))),
        ("<image>\n<image>\nBoth?", ("Both?", (0, 0))),
        ("What?\n<image>", ("What?", (5,))),
        ("A <image> and <image>.", ("A  and .", (2, 7))),
        ("<image>", ("", (0,))),
        ("one\n<image>\ntwo", ("one\n\ntwo", (4,))),
    ],
)
def test_places_and_the_line_breaks_of_the_notation(text: str, wanted: Any) -> None:
    assert placed(text) == wanted


# ---------------------------------------------------------------- several images in a cell


def listed(folder: Path, cell: Any, question: str, **config: Any) -> list[Record]:
    frame = pd.DataFrame({"image_path": [cell], "question": [question], "answer": ["yes"]})
    frame.to_csv(folder / "t.csv", index=False)
    return [*load(DataConfig(train=str(folder / "t.csv"), **config), TaskConfig(), 0)["train"].records]


def test_a_json_list_or_a_separator_gives_several_images(folder: Path) -> None:
    paths = (folder / "0.png", folder / "1.png")
    for cell, config in (('["0.png", "1.png"]', {}), ("0.png; 1.png", {"image_separator": ";"})):
        [record] = listed(folder, cell, "First <image>, then <image>: equal?", **config)
        assert record.images == paths
        assert record.turns == (Turn("First , then : equal?", ("yes",), (6, 13)),)
        assert record.group == tuple(map(str, paths))
    [record] = listed(folder, '["0.png", "1.png"]', "Equal?")
    assert record.turns == (Turn("Equal?", ("yes",)),), "without places they stand in front"


def test_one_path_in_a_cell_has_a_place_too(folder: Path) -> None:
    """LLaVA's questions moved to a table: the letters of the mark would be in the prompt."""
    [record] = listed(folder, "0.png", "<image>\nWhat is it?")
    assert record.turns == (Turn("What is it?", ("yes",), (0,)),)
    with pytest.raises(BadRowsError, match=r"0\.png; 1\.png"):
        listed(folder, "0.png; 1.png", "Equal?")


def test_places_and_images_must_match(folder: Path) -> None:
    with pytest.raises(BadRowsError, match=r"1 x <image> for 2 images"):
        listed(folder, '["0.png", "1.png"]', "Is <image> red?")
    with pytest.raises(BadRowsError, match=r"9\.png"):
        listed(folder, '["0.png", "9.png"]', "Equal?")
    with pytest.raises(BadRowsError, match="1 x <image>"):
        records(folder, [{"conversations": chat("<image>\nWhat?", "a cat")}], LLAVA)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "idefics", "internvl"])
def test_images_stand_where_they_are_placed(encoder_of: Callable[[str], Encoder], family: str) -> None:
    encoder = encoder_of(family)
    turn = Turn("First , then : equal?", ("yes",), (6, 13))
    text, _ = encoder.render(Record((turn,), (tiny.image(), tiny.image())), answered=True, expansions=["#1", "#2"])
    if family == "llava_next":  # its own template puts images in front of a turn's text
        assert text.index("#1") < text.index("#2") < text.index("First")
    else:
        assert text.index("First") < text.index("#1") < text.index("then") < text.index("#2") < text.index("equal")


def test_a_file_of_messages_alone_needs_no_image_column(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "0.png"}}, {"type": "text", "text": "What?"}]
    shown = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]}
    assert records(folder, [shown], OPENAI, "a.jsonl")[0].images == (folder / "0.png",)
    assert not caplog.records
    assert records(folder, [{"messages": chat("Say a", "a")}], OPENAI, "b.jsonl")[0].images == ()
    assert "trained on text only" in caplog.text


def test_carried_images_and_the_rows_own_keep_their_order(folder: Path) -> None:
    parts = [
        {"type": "image", "image": "2.png"},
        {"type": "text", "text": " or "},
        {"type": "image", "image_url": None},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]
    [record] = records(folder, [{"images": ["0.png"], "messages": messages}], OPENAI)
    assert [image.name for image in record.images] == ["2.png", "0.png"]  # type: ignore[union-attr]
    with pytest.raises(BadRowsError, match="1 x <image>"):
        records(folder, [{"images": ["0.png", "1.png"], "messages": messages}], OPENAI)


def test_equal_turns_under_other_system_prompts_are_other_rows(folder: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": s}, *chat("Say a", "a")]} for s in ("Be brief.", "Be kind.")]
    assert [r.system for r in records(folder, rows, OPENAI)] == ["Be brief.", "Be kind."]


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ([{"answer": "net"}], "answer is a list of objects with an answer each"),
        (["net", None], "answer is a list of texts with a null in it"),
    ],
)
def test_what_is_no_text_is_no_answer(folder: Path, cell: Any, fault: str) -> None:
    """Its Python form would be trained on, and proven."""
    with pytest.raises(BadRowsError, match=fault):
        records(folder, [{"image_path": "0.png", "question": "What?", "answer": cell}], ColumnsConfig())
    with pytest.raises(BadRowsError, match="question is list"):
        records(folder, [{"image_path": "0.png", "question": ["What?"], "answer": "a"}], ColumnsConfig())


def test_images_that_rows_share_are_held_out_together(folder: Path) -> None:
    rows = [
        {"image_path": cell, "question": f"{n}?", "answer": "a"}
        for n, cell in enumerate([["0.png", "1.png"], "0.png", "1.png", "2.png", ["2.png"], "2.png"])
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    for seed in range(4):
        split = load(DataConfig(train=str(folder / "rows.json"), validation_fraction=0.5), TaskConfig(), seed)
        seen, held = ({i for r in split[name].records for i in r.images} for name in ("train", "validation"))
        assert not seen & held


# ---------------------------------------------------------------- what is learned of several turns


def test_no_token_of_an_image_is_learned_where_a_template_ends_no_answer(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = Encoder(encoder_of("llava").processor, supervise="all")
    turns = (Turn("What?", ("Red",), (0,)), Turn("And this?", ("blue",), (0,)))
    row = Record(turns, (tiny.image(), tiny.image()))
    assert [text.strip() for text in encoder.supervised_texts(row)] == ["Red</s>", "blue</s>"]
    check_labels(encoder, [row])


def test_rows_that_a_family_can_not_take_are_named_before_training(encoder_of: Callable[[str], Encoder]) -> None:
    bad = [tiny.record("Say a", "a", []), tiny.record("b?", "b", earlier=[("a?", "a")])]
    reasons, _ = RowChecker(encoder_of("paligemma2"), Limits(None, 10_000)).check_all([tiny.record(), *bad])
    assert {row: reason[:30] for row, reason in reasons.items()} == {
        1: "has no image, and PaliGemmaPro",
        2: "this model's chat template ref",
    }


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics", "internvl", "smolvlm", "gemma3"])
@pytest.mark.parametrize("supervise", ["last", "all"])
def test_the_last_answer_or_all_of_them(encoder_of: Callable[[str], Encoder], family: str, supervise: str) -> None:
    encoder = Encoder(encoder_of(family).processor, supervise=supervise)
    row = tiny.record("And two?", "three small", earlier=[("What color?", "Red"), ("How many?", "42")])
    labels = encoder.encode([row], answered=True).labels[0]
    text = encoder.tokenizer.decode([i for i in labels if i != IGNORE], skip_special_tokens=True)
    assert "".join(text.split()) == "".join({"last": "threesmall", "all": "Red42threesmall"}[supervise])
    check_labels(encoder, [row])
    ends = sum(i in encoder.answers.end_ids for i in labels)
    assert ends == (1 if supervise == "last" else 3), (
        "LLaVA-1.5's template ends none, so the tokenizer's end is written"
    )


def test_a_run_from_conversations_to_predictions(folder: Path, checkpoint_of: Callable[[str], Path]) -> None:
    rows = [
        {"image": f"{n % 3}.png", "conversations": chat("<image>\nWhat color?", "Red", "Sure?", "yes")}
        for n in range(2)
    ]
    rows += [{"image": ["0.png", "1.png"], "conversations": chat("<image><image>\nEqual?", "no")}]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA)
    file = str(folder / "rows.json")
    config.data = DataConfig(train=file, validation=file, columns=LLAVA, supervise="all")
    result = api.run_in(folder / "run", config)
    assert result["status"] == "completed"
    predictions = pd.read_csv(folder / "run" / "predictions.csv")
    assert [json.loads(cell) for cell in predictions["conversations"]] == [row["conversations"] for row in rows]
    page = (folder / "run" / "report.html").read_text()
    assert "Sure?" in page, "the report shows the question that was answered"
    config.data.test = file
    answered = api.load(folder / "run").predict(
        pd.DataFrame(rows).assign(
            image=[
                [str(folder / i) for i in (r["image"] if isinstance(r["image"], list) else [r["image"]])] for r in rows
            ]
        )
    )
    assert answered["answer_predictions"].notna().all()
