"""Data sets of Hugging Face's `datasets`: the same rows and the same audit as files, read from disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import tiny
from vlmtune import api
from vlmtune.batching.loader import Loader
from vlmtune.batching.order import Cut, InOrder, Plan
from vlmtune.config.schema import ColumnsConfig, DataConfig, TaskConfig
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.images import open_image
from vlmtune.data.sources.hub_rows import HubRows
from vlmtune.data.sources.hub_stream import StreamedRows
from vlmtune.data.table import load
from vlmtune.errors import DataError
from vlmtune.predict.files import predict_file
from vlmtune.predict.scores import evaluate_run
from vlmtune.record import runfolder
from vlmtune.record.metrics_file import read_metrics

datasets = pytest.importorskip("datasets")
HUB = {"_target_": "vlmtune.data.sources.hub.load", "columns": ColumnsConfig(image="image")}


def rows(count: int = 6, **changed: Any) -> Any:
    pictures = [tiny.image(seed=n // 2) for n in range(count)]
    columns = {
        "image": pictures,
        "question": [f"Is it {n}?" for n in range(count)],
        "answer": ["yes", "no"] * (count // 2),
    }
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    return datasets.Dataset.from_dict({**columns, **changed}, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.DatasetDict({"train": rows(), "validation": rows(4)}).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def opened(path: Path | str, **config: Any) -> Any:
    return load(DataConfig(train=str(path), **{**HUB, **config}), TaskConfig(), 0)


def test_rows_are_read_as_files_are(saved: Path) -> None:
    split = opened(saved, validation=f"{saved}:validation")
    found, held_out = split["train"].records, split["validation"].records
    assert [r.question for r in found] == [f"Is it {n}?" for n in range(6)]
    assert [r.answers for r in found] == [("yes",), ("no",)] * 3
    assert len(held_out) == 4
    assert open_image(found[4].images[0], 10**6).tobytes() == tiny.image(seed=2).tobytes()
    assert found[0].group == found[1].group != found[2].group, "by content"
    assert found.groups() == [record.group for record in found]


def test_rows_stay_on_disk(saved: Path) -> None:
    records = opened(saved)["train"].records
    assert isinstance(records, HubRows)
    assert isinstance(records[1:3], HubRows)
    assert [r.question for r in records.select([3, 0])] == ["Is it 3?", "Is it 0?"]
    limited = opened(saved, max_train_rows=2)["train"].records
    assert isinstance(limited, HubRows)
    held = opened(saved, validation_fraction=0.34)
    assert {r.group for r in held["train"].records}.isdisjoint({r.group for r in held["validation"].records})


def test_a_folder_of_parquet_opens_by_itself(tmp_path: Path) -> None:
    rows().to_parquet(str(tmp_path / "train.parquet"))
    assert len(opened(tmp_path)["train"].records) == 6


def test_a_subset_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub can be had here, so the call to `datasets` is looked at."""
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or rows())
    opened("somebody/set:test", subset="spanish")
    assert asked == [("somebody/set", {"name": "spanish", "split": "test", "streaming": False})]


def test_bad_rows_are_listed_and_dropped(tmp_path: Path) -> None:
    rows(answer=["yes", "", "yes", "no", "yes", "no"]).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(BadRowsError, match="1 of 6 rows can't be used"):
        opened(tmp_path / "set")
    split = opened(tmp_path / "set", on_bad_row="drop", max_bad_fraction=0.5)["train"]
    assert [(bad.row, bad.reason) for bad in split.bad] == [(2, "empty answer")]
    assert [r.row for r in split.records] == [0, 2, 3, 4, 5]


def test_images_are_bounded_before_they_are_decoded(saved: Path) -> None:
    with pytest.raises(BadRowsError, match="pixels"):
        opened(saved, max_image_pixels=100)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("set/train:validation", "is a single split, so it has no 'validation'"),
        ("set:trian", "has no split 'trian'; did you mean train"),
        ("somebody/nothing", r"data\.train=.*the hub can't be reached.*hf download.*data\.train=FOLDER"),
    ],
)
def test_what_is_not_there_says_so(saved: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_a_missing_column_names_the_nearest(saved: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'images'; try data\.columns\.image=image"):
        opened(saved, columns=ColumnsConfig(image="images"))


def test_several_images_a_row_are_known_by_content(tmp_path: Path) -> None:
    pictures = [[tiny.image(seed=n % 3), tiny.image(seed=n % 2)] for n in range(6)]
    features = {
        "image": datasets.List(datasets.Image()),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
    }
    table = {"image": pictures, "question": [f"{n}?" for n in range(6)], "answer": ["a"] * 6}
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    once, again = (opened(tmp_path / "set")["train"].records for _ in range(2))
    assert all(isinstance(source, bytes) for source in once[0].images), "stored, to be decoded within bounds"
    assert once.fingerprint() == again.fingerprint()
    assert len(set(once.groups())) == 6


def test_repeated_rows_are_kept_left_out_or_refused(tmp_path: Path) -> None:
    rows(question=["Is it?", "Is it?", "a?", "b?", "c?", "d?"], answer=["yes"] * 6).save_to_disk(str(tmp_path / "set"))
    assert len(opened(tmp_path / "set")["train"]) == 6
    dropped = opened(tmp_path / "set", on_duplicate="drop")["train"]
    assert [record.row for record in dropped.records] == [0, 2, 3, 4, 5]
    assert [(row.row, row.reason) for row in dropped.bad] == [(2, "duplicate of row 1")]
    with pytest.raises(BadRowsError, match="duplicate of row 1"):
        opened(tmp_path / "set", on_duplicate="fail")


@pytest.mark.parametrize(
    ("path", "absolute"),
    [("org/set.v1:train", False), ("mnist", False), ("set", True), ("set:train", True), ("gone.csv", True)],
)
def test_a_saved_config_keeps_ids_and_makes_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, absolute: bool
) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    config = tiny.config(None)
    config.data = DataConfig(train=path)
    assert runfolder.absolute(config).data.train == (f"{tmp_path}/{path}" if absolute else path)


def test_a_run(saved: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA)
    config.data = DataConfig(train=str(saved), validation=f"{saved}:validation", **HUB)
    assert api.run_in(tmp_path / "run", config)["status"] == "completed"
    table = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert [*table.columns] == ["question", "answer", "answer_predictions", "score"]
    assert "shared, each image once" in (tmp_path / "run" / "train.log").read_text()

    config.data.test = f"{saved}:validation"
    assert predict_file(str(tmp_path / "run"), config, str(tmp_path / "out.csv")) == 0
    answered = pd.read_csv(tmp_path / "out.csv")
    assert answered["answer_predictions"].tolist() == table["answer_predictions"].tolist()
    assert "4 test rows" in evaluate_run(str(tmp_path / "run"), config, None)


# ---------------------------------------------------------------- streams


def streamed(saved: Path, **config: Any) -> Any:
    return opened(saved, streaming=True, **config)["train"].records


def test_a_stream_comes_in_order_goes_round_and_can_be_read_again(saved: Path) -> None:
    records = streamed(saved, shuffle_buffer=1)
    assert [records[n].question for n in (0, 1, 4, 7, 2)] == [f"Is it {n}?" for n in (0, 1, 4, 1, 2)]
    shuffled = streamed(saved, shuffle_buffer=6)
    first, second = ([shuffled[n].question for n in range(start, start + 6)] for start in (0, 6))
    assert sorted(first) == sorted(second) == [f"Is it {n}?" for n in range(6)]
    assert first != second
    assert [streamed(saved, shuffle_buffer=6)[n].question for n in range(6)] == first


def test_a_bad_row_of_a_stream_stops_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows(answer=["yes", "", "yes", "no", "yes", "no"]).save_to_disk(str(tmp_path / "set"))
    assert streamed(tmp_path / "set", shuffle_buffer=1)[0].question == "Is it 0?"
    with pytest.raises(DataError, match=r"row 2: empty answer; data\.on_bad_row=drop"):
        streamed(tmp_path / "set", shuffle_buffer=1)[1]
    records = streamed(tmp_path / "set", shuffle_buffer=1, on_bad_row="drop")
    assert records[1].question == "Is it 2?"
    assert "row 2: empty answer" in caplog.text
    with pytest.raises(DataError, match="has no usable row"):
        streamed(tmp_path / "set", shuffle_buffer=1, on_bad_row="drop", max_image_pixels=10)[0]


def test_each_process_reads_its_own_rows_of_a_stream(saved: Path, tmp_path: Path) -> None:
    """Together they are the rows of one process. What another one takes is neither decoded nor checked: a row that
    can't be used stops its own process alone.
    """
    whole = streamed(saved, shuffle_buffer=1)
    parts = [whole.of_process(process, 2) for process in range(2)]
    together = [parts[n % 2][n // 2].question for n in range(14)]
    assert together == [whole[n].question for n in range(14)], "beyond the end of the first epoch"
    assert [parts[1][n].question for n in range(3)] == together[1:6:2], "read again from the beginning"
    rows(answer=["yes", "", "yes", "no", "yes", "no"]).save_to_disk(str(tmp_path / "bad"))
    first, second = (streamed(tmp_path / "bad", shuffle_buffer=1).of_process(process, 2) for process in range(2))
    assert first[2].question == "Is it 4?"
    with pytest.raises(DataError, match="row 2: empty answer"):
        second[0]


def test_an_empty_micro_batch_reads_nothing_of_a_stream_again(
    saved: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps of five rows in pairs, a process has a pair and one row, or a pair and nothing."""
    run = tiny.assemble(tiny.config(checkpoint_of("qwen2_vl")), tiny.records(4))
    records, starts, real = streamed(saved, shuffle_buffer=1), [], StreamedRows._rows
    monkeypatch.setattr(StreamedRows, "_rows", lambda self: starts.append(self) or real(self))
    engine: Any = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"))
    plan = Plan(InOrder(Cut(2, 5, 2)), 4)
    loader = Loader(run.encoder, records, plan, run.loader.layout, run.config.trainer, engine)
    batches = [*loader.micro_batches()]
    assert [batch.rows for batch in batches] == [2, 0, 2, 1] * 2
    assert len(starts) == 1


def test_a_stream_without_rows_says_so(saved: Path) -> None:
    records = streamed(saved, shuffle_buffer=1)
    records.dataset = records.dataset.take(0)
    with pytest.raises(DataError, match="the stream has no usable row"):
        records[0]


def test_a_process_without_a_usable_row_takes_some_of_the_next_epoch(tmp_path: Path) -> None:
    rows(3, answer=["yes", "", "yes"]).save_to_disk(str(tmp_path / "set"))
    second = streamed(tmp_path / "set", shuffle_buffer=1, on_bad_row="drop").of_process(1, 2)
    assert [second[n].question for n in range(3)] == ["Is it 0?", "Is it 2?", "Is it 0?"]


def test_a_streamed_run_and_its_resumption(
    saved: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(checkpoint_of("qwen2_vl"), adapter=tiny.LORA, max_steps=4, save_every=2, num_workers=2)
    """Workers would each read a part of the stream, so it has none."""
    config.data = DataConfig(
        train=str(saved), validation=f"{saved}:validation", streaming=True, shuffle_buffer=3, max_eval_rows=2, **HUB
    )
    straight = api.run_in(tmp_path / "straight", config)
    assert straight["status"] == "completed"
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "train/loss" in row]
    shutil.rmtree(tmp_path / "straight" / "checkpoints" / "step_000004")
    config.resume = str(tmp_path / "straight")
    api.run_in(tmp_path / "straight", config)
    again = [row["train/loss"] for row in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "train/loss" in row]
    assert again == losses


def test_a_stream_needs_a_length() -> None:
    from vlmtune.config.together import combinations

    config = tiny.config("somewhere", max_steps=None, eval_every="epoch")
    config.data = DataConfig(train="a/b", validation="a/b", streaming=True, validation_fraction=0.1, **HUB)
    assert [problem.partition(":")[0] for problem in combinations(config)] == [
        "data.streaming",
        "data.streaming",
        "data.validation_fraction",
        "data.max_eval_rows",
    ]
