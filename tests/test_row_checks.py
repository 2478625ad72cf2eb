"""Rows are held against the model before the first step: one bad row costs one row, and none is trained on blindly."""

from __future__ import annotations

import copy
import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken

import tiny
import vlmtune
from vlmtune.config.schema import DataConfig, GenerationConfig
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import RecordList, Split
from vlmtune.errors import ModelError
from vlmtune.prompt.encode import Encoder
from vlmtune.proof import rows as row_checks
from vlmtune.proof.row_checker import Limits, RowChecker, limits_of
from vlmtune.proof.rows import check_rows

ROOMY = Limits(100_000, 100_000)


def config(**data: Any) -> Any:
    made = tiny.config(None)
    made.data = DataConfig(**data)
    return made


def looked(encoder: Encoder, records: list[Record], limits: Limits = ROOMY) -> dict[int, str]:
    return RowChecker(encoder, limits).check_all(records)[0]


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "smolvlm", "gemma3", "idefics"])
def test_a_row_is_too_long_from_the_first_token_on(encoder_of: Callable[[str], Encoder], family: str) -> None:
    """Image tokens, template and end token are counted; the bound that saves tokenizing never lets one through."""
    encoder = encoder_of(family)
    records = [tiny.record("word " * 30, "é 赤" * 5, [tiny.image(112, 56)]), tiny.record("x", "y")]
    length = len(encoder.encode(records[:1], answered=True).input_ids[0])
    assert looked(encoder, records, Limits(length, 100_000)) == {}
    found = looked(encoder, records, Limits(length - 1, 100_000))
    assert list(found) == [0]
    assert f"{length} tokens" in found[0]
    assert "longer than the model's context" in found[0]


def test_bounds_are_no_smaller_than_lengths(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen2_vl")
    sizes = [(28 * (1 + n % 7), 28 * (1 + n % 5)) for n in range(40)]  # more than are tried one by one
    records = [tiny.record(f"ü{n}?", "a\n\nb", [tiny.image(*size, n)]) for n, size in enumerate(sizes)]
    _, bounds = RowChecker(encoder, ROOMY).check_all(records)
    assert all(bound >= sum(real) for bound, real in zip(bounds, encoder.lengths(records), strict=True))


def test_a_stretched_context_counts(model_of: Callable[[str], Any]) -> None:
    model = model_of("qwen2_vl")
    assert limits_of(model) == Limits(4096, model.get_input_embeddings().weight.shape[0])
    text = model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "factor": 4.0, "original_max_position_embeddings": 2048}
    assert limits_of(model).positions == 8192
    idefics = model_of("idefics")
    assert limits_of(idefics).embeddings == idefics.config.vocab_size + 3


# ---------------------------------------------------------------- images


def test_what_the_processor_refuses_is_found_by_size(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen2_vl")
    thin, wide, fine = (Image.new("RGB", size) for size in ((2, 900), (4000, 8), (64, 64)))
    found = looked(encoder, [tiny.record(images=[fine]), tiny.record(images=[thin]), tiny.record(images=[fine, wide])])
    assert list(found) == [1, 2]
    assert "the model's processor refuses the image (2x900)" in found[1]
    assert "64x64, 4000x8" in found[2]


def test_among_many_sizes_only_the_extreme_are_tried(
    encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("qwen2_vl")
    tried: list[Any] = []
    real = encoder.images.tokens
    monkeypatch.setattr(encoder.images, "tokens", lambda sizes: tried.append(sizes) or real(sizes))
    records = [tiny.record(images=[Image.new("RGB", (30 + n, 50))]) for n in range(200)]
    records += [tiny.record(images=[Image.new("RGB", (1, 300 + n))]) for n in range(3)]
    assert sorted(looked(encoder, records)) == [200, 201, 202]
    assert len(set(tried)) < 30


# ---------------------------------------------------------------- the embedding


def test_a_token_without_an_embedding_names_both_numbers(encoder_of: Callable[[str], Encoder]) -> None:
    processor = copy.deepcopy(encoder_of("qwen2_vl").processor)
    processor.tokenizer.add_tokens([AddedToken("<|quad_start|>", special=True, normalized=False)])
    encoder = Encoder(processor)
    number = encoder.tokenizer.convert_tokens_to_ids("<|quad_start|>")
    rows = [tiny.record(), tiny.record(answer="<|quad_start|>"), tiny.record("<|quad_start|>?")]
    found = looked(encoder, rows, Limits(None, number))
    assert list(found) == [1, 2]
    assert f"id {number}, the model's embedding {number} rows" in found[1]
    assert looked(encoder, rows, Limits(None, number + 1)) == {}


def test_a_tokenizer_of_another_model_is_refused(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen2_vl")
    split = {"train": Split(RecordList([tiny.record()]))}
    with pytest.raises(ModelError, match=r"the tokenizer has \d+ tokens, but the model's embedding only 100 rows"):
        check_rows(encoder, split, config(), Limits(None, 100))


# ---------------------------------------------------------------- the policy


def test_refused_rows_follow_the_policy(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("qwen2_vl")

    def splits() -> dict[str, Split]:
        rows = [Record((Turn(f"{n}?", ("a",)),), (tiny.image(),), file="t.csv", row=n) for n in range(20)]
        strip = Record((Turn("strip?", ("a",)),), (Image.new("RGB", (4000, 8)),), file="t.csv", row=20)
        return {"train": Split(RecordList([*rows, strip])), "validation": Split(RecordList([*rows[:9], strip]))}

    with pytest.raises(BadRowsError, match=r"1 of 21 rows can't be used .*refuses the image") as caught:
        check_rows(encoder, splits(), config(), ROOMY)
    assert [bad.row for bad in caught.value.bad] == [21, 21]
    found = splits()
    check_rows(encoder, found, config(on_bad_row="drop"), ROOMY)
    assert [len(split) for split in found.values()] == [20, 9]
    assert [len(split.bad) for split in found.values()] == [1, 1]
    with pytest.raises(BadRowsError, match=r"above data\.max_bad_fraction=0\.05"):
        check_rows(encoder, splits(), config(on_bad_row="drop", max_bad_fraction=0.05), ROOMY)


def table(folder: Path, rows: list[tuple[Path, str, str]]) -> str:
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_path", "question", "answer"), *rows])
    return str(folder / "t.csv")


def test_a_run_leaves_them_out_and_lists_them(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    """A row too long and an image too thin, in training and in what is evaluated."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint_of("qwen2_vl"), model)
    settings = json.loads((model / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 200
    (model / "config.json").write_text(json.dumps(settings))
    tiny.image().save(tmp_path / "a.png")
    Image.new("RGB", (8, 3000)).save(tmp_path / "thin.png")
    rows = [(tmp_path / "a.png", f"What {n}?", "red") for n in range(24)]
    data = table(tmp_path, [*rows, (tmp_path / "thin.png", "?", "red"), (tmp_path / "a.png", "w " * 300, "red")])
    result = vlmtune.train(
        [
            "model=auto",
            f"model.path={model}",
            "data=csv",
            f"data.train={data}",
            f"data.validation={data}",
            "data.on_bad_row=drop",
            "tracker=none",
            "trainer.batch_size=4",
            "trainer.epochs=1",
            "generation.max_new_tokens=2",
            f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )
    assert result["examples"] == 24
    listed = list(csv.DictReader((tmp_path / "run" / "quarantine.csv").read_text().splitlines()))
    assert [(row["line"], row["row"]) for row in listed] == [("26", "25"), ("27", "26")] * 2
    assert "processor refuses the image (8x3000)" in listed[0]["reason"]
    assert "limit 200" in listed[1]["reason"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "longest    " in log
    assert "rows       48 fit" in log


# ---------------------------------------------------------------- what is said


def test_markers_and_long_references_are_told_once(
    encoder_of: Callable[[str], Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmtune")
    encoder, made = encoder_of("qwen2_vl"), config()
    made.generation = GenerationConfig(max_new_tokens=4)
    rows = [tiny.record("<image>\nWhat?", "red"), tiny.record("a <|im_end|>", "b"), tiny.record("<image>", "c " * 9)]
    check_rows(encoder, {name: Split(RecordList(rows)) for name in ("train", "validation")}, made, ROOMY)
    assert "<image> in 4 rows, <|im_end|> in 2 rows" in caplog.text
    assert "generation.max_new_tokens=4 is too small for the references of 1 of 3 evaluated rows" in caplog.text
    caplog.clear()
    check_rows(encoder, {"train": Split(RecordList(rows[1:2] * 2))}, made, ROOMY)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_rows_of_unlike_form_are_all_proven(encoder_of: Callable[[str], Encoder]) -> None:
    rows = [tiny.record("a?", "b")] * 50 + [
        tiny.record("a?", "\nb"),
        tiny.record("a?", "$1"),
        tiny.record("a?", "b", []),
    ]
    assert row_checks.examples(encoder_of("qwen2_vl"), RecordList(rows)) == [rows[0], *rows[-3:]]


def test_a_stream_asks_the_model_for_each_row(encoder_of: Callable[[str], Encoder], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from vlmtune.config.schema import TaskConfig
    from vlmtune.data.reader import RowReader
    from vlmtune.data.sources.hub_stream import StreamedRows

    cells = [{"image_path": None, "question": q, "answer": "a"} for q in ("one?", "long " * 200, "three?")]
    data = DataConfig(on_bad_row="drop")
    stream = datasets.Dataset.from_list(cells).to_iterable_dataset()
    split = Split(StreamedRows(stream, RowReader(data, TaskConfig(), "set", True), data, 0))
    check_rows(encoder_of("qwen2_vl"), {"train": split}, config(on_bad_row="drop"), Limits(150, 100_000))
    assert [split.records[n].question for n in range(2)] == ["one?", "three?"]
