"""Out of memory: micro-batches are halved with the same result, or the error says when, what is held and what helps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vlmtune
from runs import assert_same_weights, losses, words
from vlmtune import memory
from vlmtune import run as page
from vlmtune.batching.order import ByTokens, Cut, InOrder, Order
from vlmtune.errors import OutOfMemory, failure_of
from vlmtune.evaluation import answering
from vlmtune.memory import Held, memory_advice, noted
from vlmtune.proof import first_pass
from vlmtune.training import checkpoint

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Overrides:
    """A run of 3 steps of 8 rows, with dropout; its 20 rows are no multiple of that."""
    rows = tmp_path_factory.mktemp("rows")
    table = tiny.write_csv(rows, [(f"number {i}?" + " word" * (i % 5), ("red", "blue")[i % 2]) for i in range(20)])

    def make(folder: Path, *more: str) -> list[str]:
        steps = ["trainer.batch_size=8", "trainer.rows_per_step=8", "trainer.max_steps=3", "trainer.learning_rate=1e-2"]
        own = [*steps, "adapter.lora_dropout=0.2", "trainer.log_every=1", f"hydra.run.dir={folder}"]
        return [*words(checkpoint_of("qwen2_vl"), table), *own, *more]

    return make


def assert_equal(folder: Path, other: Path) -> None:
    assert_same_weights(folder, other)
    assert losses(folder) == losses(other)


@pytest.fixture(scope="module")
def in_twos(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in micro-batches of 2 rows from the start."""
    folder = tmp_path_factory.mktemp("in twos") / "run"
    vlmtune.train(overrides(folder, "trainer.batch_size=2"))
    return folder


def limit(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fits: Callable[[Any], bool]) -> None:
    """Have a pass of the model raise CUDA's error for a batch that does not fit."""
    real = getattr(owner, name)

    def limited(model: Any, batch: Any) -> Any:
        if not fits(batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return real(model, batch)

    monkeypatch.setattr(owner, name, limited)


def two_rows(batch: Any) -> bool:
    return bool(batch.rows <= 2)


# ---------------------------------------------------------------- halved


def test_what_does_not_fit_at_the_start_is_halved_with_the_result_of_the_smaller_size(
    overrides: Overrides, in_twos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner in (page, first_pass):
        limit(monkeypatch, owner, "summed_loss", two_rows)
    folder = tmp_path / "run"
    assert vlmtune.train(overrides(folder, "trainer.auto_micro_batch=true"))["status"] == "completed"
    assert_equal(folder, in_twos)
    said = (folder / "train.log").read_text()
    assert "halved to micro-batches of 4 rows" in said
    assert "halved to micro-batches of 2 rows" in said
    assert "begins again" not in said


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_that_does_not_fit_begins_again_with_the_result_of_the_smaller_size(
    overrides: Overrides, in_twos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The first half of the step has left its gradients by then. A resume begins with the size that was found."""
    calls: list[int] = []

    def second_of_four_rows_is_too_much(batch: Any) -> bool:
        calls.append(batch.rows)
        return calls != [4, 4]

    if place == "forward":
        limit(monkeypatch, page, "summed_loss", second_of_four_rows_is_too_much)
    else:
        real = page.summed_loss

        def failing_backward(model: Any, batch: Any) -> torch.Tensor:
            loss = real(model, batch)
            if not second_of_four_rows_is_too_much(batch):
                loss.register_hook(lambda gradient: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
            return loss

        monkeypatch.setattr(page, "summed_loss", failing_backward)
    folder = tmp_path / "run"
    vlmtune.train(overrides(folder, "trainer.batch_size=4", "trainer.auto_micro_batch=true", "trainer.save_every=2"))
    assert_equal(folder, in_twos)
    assert (
        "step 1 does not fit into memory: it begins again, in micro-batches of 2 rows"
        in (folder / "train.log").read_text()
    )
    calls.clear()
    for left in ("model", "checkpoints/step_000003"):
        (folder / left).rename(tmp_path / left.replace("/", "-"))
    vlmtune.train([f"resume={folder}"])
    assert_equal(folder, in_twos)
    assert calls
    assert max(calls) == 2


def test_one_row_that_does_not_fit_is_an_error(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, first_pass, "summed_loss", lambda batch: False)
    with pytest.raises(OutOfMemory, match=r"in a check before training.*frozen weights .*Less is needed with") as found:
        vlmtune.train(overrides(tmp_path / "run", "trainer.auto_micro_batch=true"))
    assert "auto_micro_batch" not in str(found.value)
    error = json.loads((tmp_path / "run" / "result.json").read_text())["error"]
    assert (error["type"], error["failure"]) == ("OutOfMemory", "out_of_memory")


def test_without_the_key_nothing_is_halved(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is named, and what was reached before it is kept."""
    steps: list[int] = []
    limit(monkeypatch, page, "summed_loss", lambda batch: len(steps) < 2 or bool(steps.append(0)))
    real = page.loop.Hooks

    def noting(**given: Any) -> Any:
        return real(**{**given, "after_step": (lambda report: steps.append(report.step), *given["after_step"])})

    monkeypatch.setattr(page.loop, "Hooks", noting)
    with pytest.raises(OutOfMemory) as found:
        vlmtune.train(overrides(tmp_path / "run"))
    said = str(found.value)
    assert "out of device memory, in step 3, in the forward pass of 4 rows, " in said
    assert "optimizer state" in said
    assert "trainer.auto_micro_batch=true" in said
    assert "eval_batch_size" not in said
    assert "goes on after step 2" in (tmp_path / "run" / "train.log").read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


def test_a_state_that_could_not_be_written_is_not_said_to_be_saved(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes fails, after the state was copied."""
    passes: list[int] = []
    limit(monkeypatch, page, "summed_loss", lambda batch: passes.append(0) or len(passes) == 1)

    def full_disk(*_: Any, **__: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full_disk)
    with pytest.raises(OutOfMemory, match="in step 2"):
        vlmtune.train(overrides(tmp_path / "run", "trainer.save_every=500"))
    said = (tmp_path / "run" / "train.log").read_text()
    assert "what was reached before could not be saved: " in said
    assert "goes on after step" not in said


def test_an_evaluation_takes_fewer_rows_with_the_same_answers(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = next(word for word in overrides(tmp_path) if word.startswith("data.train=")).removeprefix("data.train=")
    evaluated = [f"data.validation={table}", "data.max_eval_rows=8", "generation.max_new_tokens=2"]
    straight = vlmtune.train(overrides(tmp_path / "straight", *evaluated, "trainer.eval_batch_size=2"))
    limit(monkeypatch, answering, "logits_in_pieces", two_rows)
    found = vlmtune.train(overrides(tmp_path / "run", *evaluated, "trainer.auto_micro_batch=true"))
    assert found["metrics"] == straight["metrics"]
    answers = [(tmp_path / name / "predictions.csv").read_text() for name in ("run", "straight")]
    assert answers[0] == answers[1]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight"), "an evaluation cut short leaves training mode on"
    said = (tmp_path / "run" / "train.log").read_text()
    assert said.count("the evaluation starts again with 2") == 1


LIMITED = """
import resource, sys
import vlmtune, vlmtune.run
prove = sys.modules["vlmtune.proof.prove"]
real = prove.check_gradients
def then_limited(*given, **options):
    line = real(*given, **options)
    size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + 150_000_000, resource.RLIM_INFINITY))
    return line
prove.check_gradients = then_limited
vlmtune.train(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False])
def test_a_machine_that_refuses_more_memory(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, automatic: bool
) -> None:
    """No fake: the system refuses, 150 MB above what the process has before its largest micro-batch."""
    table = tiny.write_csv(tmp_path, [(f"number {i}?" + " word" * 150, "red") for i in range(64)], per_image=64)
    model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "tracker=none", "trainer.max_steps=1"]
    data = ["data=csv", f"data.train={table}", "trainer.share_prefix=off", "data.cache_features=off"]
    size = ["trainer.batch_size=64", f"trainer.auto_micro_batch={automatic}", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *model, *data, *size],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if automatic:
        assert "halved to micro-batches of 32 rows at most" in done.stderr
        assert (result["status"], result["examples"]) == ("completed", 64)
    else:
        assert result["error"]["failure"] == "out_of_memory"
        assert "refuses more, in a check before training. Held: frozen weights" in result["error"]["message"]
        assert "Less is needed with trainer.auto_micro_batch=true" in result["error"]["message"]


# ---------------------------------------------------------------- what halving keeps


ROWS = [(10, 3 + n % 7) for n in range(53)]


def by_tokens(processes: int) -> ByTokens:
    return ByTokens(ROWS, range(53), batch_tokens=70, passes_per_step=5, processes=processes, seed=3, by_group=False)


ORDERS: dict[str, Callable[[int], Any]] = {
    "rows": lambda processes: Order(range(53), Cut(8, 14, processes), seed=3, by_group=False),
    "tokens": by_tokens,
    "stream": lambda processes: InOrder(Cut(8, 14, processes)),
}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ORDERS)
def test_halving_keeps_the_rows_of_each_step_and_the_same_number_of_passes_on_each_process(
    kind: str, processes: int
) -> None:
    whole, order = ORDERS[kind](processes), ORDERS[kind](processes)
    sizes = [order.most_rows]
    while order.most_rows > 1:
        order.halve()
        sizes.append(order.most_rows)
        for step in range(4):
            assert order.step(step) == whole.step(step)
            passes = [order.passes(step, process) for process in range(processes)]
            assert len({*map(len, passes)}) == 1
            for process, own in enumerate(passes):
                rows = [row for part in own for row in part]
                assert rows == [row for part in whole.passes(step, process) for row in part]
                assert max(map(len, own)) <= order.most_rows
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert len(sizes) > 3


# ---------------------------------------------------------------- the error


def held(**bytes_of: int) -> Held:
    none = dict.fromkeys(("frozen", "trained", "gradients", "state", "linear"), 0)
    return Held(**none | bytes_of)


def advice(found: Held) -> str:
    error = torch.OutOfMemoryError("CUDA")
    error.circumstances = memory.Circumstances(held=found)  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemory) as told, memory_advice(["trainer.batch_tokens"]):
        raise error
    return str(told.value)


def test_what_saves_most_is_named_first() -> None:
    heavy_weights = advice(held(frozen=16 * 10**9, linear=11 * 10**9, rest=2 * 10**9))
    assert "Less is needed with quantization=nf4 (saves about 11 GB), trainer.auto_micro_batch=true" in heavy_weights
    full = advice(held(trained=8 * 10**9, linear=6 * 10**9, rest=4 * 10**9))
    order = ["adapter=lora (saves about 24 GB)", "optimizer.offload=true (saves about 16 GB)", "optimizer=adamw_8bit"]
    places = [full.index(each) for each in [*order, "quantization=nf4", "trainer.batch_size", "a smaller model"]]
    assert places == sorted(places)
    activations = advice(held(frozen=10**9, linear=10**6, rest=70 * 10**9))
    assert "Less is needed with trainer.auto_micro_batch=true, a smaller trainer.batch_size" in activations
    assert "quantization" not in activations, "it would save next to nothing"


def test_what_is_held_is_what_the_model_and_the_optimizer_hold() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 20, bias=False), torch.nn.Linear(20, 5, bias=False))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    found = Held.of(model, optimizer)
    assert (found.frozen, found.trained, found.gradients) == (800, 400, 400)
    assert 800 <= found.state <= 816, "two averages, and a count of steps"
    assert found.rest > 10**7, "this process, with its libraries"
    assert str(found).startswith("frozen weights 800 B, trained weights 400 B, gradients 400 B, optimizer state 80")


def test_places_are_told_from_the_outside_in_and_other_errors_are_left_alone() -> None:
    told = pytest.raises(OutOfMemory, match=r"memory.*, in the run, in a step\. Less")
    with told, memory_advice(), noted("in the run"), noted("in a step"):
        raise MemoryError
    with pytest.raises(RuntimeError) as found, memory_advice(), noted("in a step"):
        raise RuntimeError("shapes differ")
    assert not vars(found.value)


def test_failures_have_classes() -> None:
    from vlmtune.data.bad_rows import BadRowsError
    from vlmtune.errors import NonFinite, StorageError, UsageError
    from vlmtune.launch.signals import Interrupted

    assert [
        failure_of(error)
        for error in (OutOfMemory(""), NonFinite(""), BadRowsError("", []), UsageError(""), StorageError(""))
    ] == ["out_of_memory", "not_finite", "data", "config", "other"]
    assert failure_of(Interrupted(15)) == failure_of(KeyboardInterrupt()) == "killed"
