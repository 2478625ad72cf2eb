"""An evaluation prepares each image once, holds few images and logits, and gives the same however rows are dealt."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import tiny
import tiny_families
from grids import sampled
from test_families import SHARED
from vlmtune.batching import workers
from vlmtune.batching.layout import Layout, lay_out, padded
from vlmtune.config.schema import Config
from vlmtune.data.records import Record
from vlmtune.errors import DataError
from vlmtune.evaluation import answering
from vlmtune.evaluation import evaluate as evaluation
from vlmtune.evaluation.answering import Found, loss_and_likely
from vlmtune.evaluation.prepared import Prepared, _Items, dealt
from vlmtune.objectives import next_token
from vlmtune.prompt import image_inputs, recent_images
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.recent_images import RecentImages, key_of

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
SIZES = ((56, 56), (84, 56), (112, 112))


def config(size: int = 4, **trainer: Any) -> Config:
    return tiny.config(None, eval_batch_size=size, generation={"max_new_tokens": 3}, **trainer)


def evaluated(model: Any, encoder: Encoder, rows: list[Record], share: bool = False, **trainer: Any) -> Any:
    layout = Layout(share, share)
    return evaluation.evaluate(model, encoder, rows, config(**trainer), Accelerator(cpu=True), title="", layout=layout)


def on_disk(folder: Path, count: int, per_image: int) -> list[Record]:
    """Rows about image files, of which every second one is answered as the model would not."""
    rows = tiny.records(count, per_image=per_image, sizes=SIZES)
    for number, record in enumerate(rows):
        record.images[0].save(folder / f"{number // per_image}.png")
    files = [folder / f"{number // per_image}.png" for number in range(count)]
    return [Record(row.turns, (file,), row.group, row=n) for n, (row, file) in enumerate(zip(rows, files, strict=True))]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources of images as this process opens them."""
    seen: list[Any] = []
    plain = image_inputs.open_image

    def noting(source: Any, *more: Any) -> Any:
        seen.append(source)
        return plain(source, *more)

    monkeypatch.setattr(image_inputs, "open_image", noting)
    return seen


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("share", [False, True])
def test_each_image_is_prepared_once_for_the_loss_and_the_answers(
    encoder_of: Any, model_of: Callable[[str], Any], tmp_path: Path, opened: list[Any], share: bool
) -> None:
    """Batches of 4 rows, 3 rows an image: most images are in two batches, and all rows are generated."""
    rows = on_disk(tmp_path, 11, per_image=3)
    evaluated(model_of("qwen2_vl"), encoder_of("qwen2_vl"), rows, share)
    assert sorted(opened) == sorted({row.images[0] for row in rows})


def test_workers_prepare_what_this_process_would(
    encoder_of: Any,
    model_of: Callable[[str], Any],
    tmp_path: Path,
    opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All but the first batch, whose size says how many workers shared memory has room for."""
    model, encoder = model_of("qwen2_vl"), encoder_of("qwen2_vl")
    rows = [*on_disk(tmp_path, 11, per_image=3), tiny.record("Say yes", "yes", [])]
    alone = evaluated(model, encoder, rows)
    opened.clear()
    assert evaluated(model, encoder, rows, num_workers=2) == alone
    assert opened == [tmp_path / "0.png", tmp_path / "1.png"]
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 0)
    assert evaluated(model, encoder, rows, num_workers=2) == alone
    assert "0 processes" in caplog.text


def test_what_workers_run_can_be_sent_to_them(encoder_of: Any, tmp_path: Path) -> None:
    """Where processes are not forked."""
    items = _Items(encoder_of("qwen2_vl"), on_disk(tmp_path, 6, per_image=1), dealt(6, 3))
    sent = pickle.loads(pickle.dumps(items))
    for number in range(2):
        found, wanted = sent[number].entries, items[number].entries
        assert found.keys() == wanted.keys() == {0, 1, 2}
        for place, entry in wanted.items():
            torch.testing.assert_close(found[place].inputs, entry.inputs, rtol=0, atol=0)
            assert found[place].expansions == entry.expansions


def test_an_image_that_a_worker_can_not_open_is_an_error_with_its_row(
    encoder_of: Any, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    rows = on_disk(tmp_path, 9, per_image=1)
    (tmp_path / "6.png").write_bytes(b"no image any more")
    with pytest.raises(DataError, match=r"row 7.*6\.png"):
        evaluated(model_of("qwen2_vl"), encoder_of("qwen2_vl"), rows, num_workers=2)


def test_few_images_are_held(encoder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the batch, of waiting rows whatever their age, and of earlier rows up to the limit."""
    rows = on_disk(tmp_path, 12, per_image=1)
    prepared = Prepared(encoder_of("llava"), rows, dealt(12, 2), config().trainer, Accelerator(cpu=True))
    recent, held = prepared.recent, []
    assert recent is not None
    for number, (_, batch) in enumerate(prepared):
        padded(prepared.encoder, batch)
        if number == 0:
            size = recent.get(rows[0].images).size
            monkeypatch.setattr(recent_images, "KEPT_BYTES", 3 * size)
        prepared.let_go([rows[1]])
        held.append([n for n, row in enumerate(rows) if recent.get(row.images)])
    assert held[:2] == [[0, 1], [0, 1, 2, 3]]
    assert held[2:] == [[1, 3, 4, 5], [1, 5, 6, 7], [1, 7, 8, 9], [1, 9, 10, 11]]


def test_an_image_is_known_by_its_file_or_by_itself() -> None:
    first, second = tiny.image(), tiny.image()
    assert key_of([first]) != key_of([second])
    assert key_of([Path("a"), b"1"]) == key_of([Path("a"), b"1"]) != key_of([b"1", Path("a")])
    kept = RecentImages()
    entry = recent_images.Entry({}, [])
    for _ in range(3):  # an image made anew, perhaps where the last one was
        source = tiny.image()
        assert kept.get([source]) is None
        kept.put([source], entry)
        del source


def test_a_run_with_a_cache_keeps_it(encoder_of: Any) -> None:
    cache = RecentImages()
    prepared = Prepared(encoder_of("llava").keeping(cache), [], [], config().trainer, Accelerator(cpu=True))
    assert prepared.encoder.image_cache is cache
    assert prepared.recent is None


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("family", sampled(FAMILIES, ("qwen2_vl", "llava", "paligemma2")))
def test_logits_exist_in_pieces(
    family: str, encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families that change them after the output embedding compute all."""
    model, encoder = model_of(family), encoder_of(family)
    head = model.get_output_embeddings()
    for share in (False, *([True] if family in SHARED else [])):
        batch = lay_out(encoder, tiny.records(6, per_image=2, sizes=SIZES), Layout(share))
        losses, likely = loss_and_likely(model, batch, Accelerator(cpu=True), [])
        with monkeypatch.context() as patch:
            patch.setattr(next_token, "MOST_LOGITS", 3 * head.weight.shape[0])
            widest: list[int] = []
            hook = head.register_forward_hook(lambda m, args, out, seen=widest: seen.append(out.shape[:-1].numel()))
            found, same = loss_and_likely(model, batch, Accelerator(cpu=True), [])
            hook.remove()
        assert same == likely
        assert float(sum(found)) == pytest.approx(float(sum(losses)), rel=1e-5)
        if next_token._after_the_head(model.config):
            assert widest == [batch.supervised]
        else:
            assert max(widest) <= max(3, len(batch.input_ids))
            assert widest.count(3) >= batch.supervised // 3


def test_tokens_that_are_never_written_are_not_likely(encoder_of: Any, model_of: Callable[[str], Any]) -> None:
    model, encoder = model_of("qwen2_vl"), encoder_of("qwen2_vl")
    batch = padded(encoder, tiny.records(4))
    losses, likely = loss_and_likely(model, batch, Accelerator(cpu=True), [])
    same, other = loss_and_likely(model, batch, Accelerator(cpu=True), likely[:1])
    assert torch.equal(torch.stack(same), torch.stack(losses))
    assert likely[0] not in other
    assert [a for a, b in zip(other, likely, strict=True) if b != likely[0]] == [b for b in likely if b != likely[0]]


def test_a_batch_is_read_from_the_device_once(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses follow at the end of a round. What the model itself reads is not counted."""
    model, batch = model_of("llava"), padded(encoder_of("llava"), tiny.records(4))
    monkeypatch.setattr(answering, "PIECE", 2)
    pieces, read = math.ceil(batch.supervised / 2), []
    logits = [*next_token.logits_in_pieces(model, batch)]
    monkeypatch.setattr(answering, "logits_in_pieces", lambda *_: logits)
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda t, name=name, plain=plain: read.append(name) or plain(t))
    losses, _ = loss_and_likely(model, batch, Accelerator(cpu=True), [])
    assert read == ["tolist"]
    assert len(losses) == pieces > 1


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_rows_are_dealt_out_evenly(processes: int, size: int) -> None:
    for rows in range(60):
        batches = dealt(rows, size, processes)
        assert [row for batch in batches for row in batch] == [*range(rows)]
        assert all(0 < len(batch) <= size for batch in batches)
        turns = [len(batches[rank::processes]) for rank in range(processes)]
        shares = [sum(map(len, batches[rank::processes])) for rank in range(processes)]
        if processes == 1:
            assert {*map(len, batches[:-1])} <= {size}
        elif rows >= size * processes * 2:
            assert max(shares) - min(shares) <= size
        assert max(turns) <= max(math.ceil(rows / (size * processes)), 0)


def test_the_loss_does_not_depend_on_who_computed_it() -> None:
    values = {row: [0.1 * row, 1e9 / (row + 1)] for row in range(0, 40, 4)}
    whole, parts = Found(values), Found()
    for rank in (1, 0):
        parts.add(Found({row: each for row, each in values.items() if row // 4 % 2 == rank}))
    assert parts.loss == whole.loss


def test_the_bar_counts_rows_and_answers_come_in_order(
    encoder_of: Any, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose answer is the reference are done after the loss, before earlier ones that are generated."""
    model, encoder, rows = model_of("qwen2_vl"), encoder_of("qwen2_vl"), tiny.records(10, per_image=3, sizes=SIZES)
    monkeypatch.setattr(evaluation, "ROUND", 1)
    plain = answering.Draft.answers
    found = evaluated(model, encoder, rows, size=3)

    def drafted(self: Any, records: list[Record], *given: Any) -> list[str | None]:
        plain(self, records, *given)
        return ["drafted" if record.question == "Is it red?" else None for record in records]

    monkeypatch.setattr(answering.Draft, "answers", drafted)
    totals: list[int] = []
    counted: list[int] = []

    class Bar:
        def __init__(self, title: str, total: int, show: bool):
            totals.append(total)

        def __enter__(self) -> Any:
            return counted.append

        def __exit__(self, *error: Any) -> None: ...

    monkeypatch.setattr(evaluation.display, "bar", Bar)
    told: list[tuple[int, list[str]]] = []
    again = evaluation.evaluate(
        model,
        encoder,
        rows,
        config(3),
        Accelerator(cpu=True),
        title="",
        done=lambda first, texts: told.append((first, texts)),
    )
    assert totals == [10] == [sum(counted)]
    pairs = zip(rows, found.predictions, strict=True)
    wanted = ["drafted" if row.question == "Is it red?" else text for row, text in pairs]
    assert again.predictions == wanted == [text for _, texts in told for text in texts]
    assert [first for first, _ in told] == [sum(len(texts) for _, texts in told[:n]) for n in range(len(told))]
    assert len(told) > 1
    assert again.metrics["loss"] == found.metrics["loss"]
