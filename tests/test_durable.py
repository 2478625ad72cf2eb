"""Whole or absent, at every place where a kill may fall, and checked when read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune import durable
from vlmtune.errors import CheckpointError
from vlmtune.record.progress import Progress
from vlmtune.training import snapshot
from vlmtune.training.checkpoint import all_checkpoints, check, load_checkpoint, newest, set_aside, write

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open")
"""Of `os`: a kill falls in front of one of them."""


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(root: Path, step: int, *, examples: int = 0, keep: int = 2) -> Path:
    model, optimizer = small()
    progress = Progress(step=step, examples=examples)
    taken = snapshot.take(model, optimizer, None, progress, {})
    return write(root, taken, keep=keep)


def load(folder: Path) -> Progress:
    model, optimizer = small()
    return load_checkpoint(folder, model, optimizer, None, {})


def killed(job: Callable[[], Any], place: int) -> bool:
    """Run `job` in a process that kills itself in front of its `place`-th call; False where it makes fewer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        left = place

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            job()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the job failed by itself: {status}"
    return status == signal.SIGKILL


def kills(root: Path, before: Callable[[], Any], job: Callable[[], Any], *, least: int) -> Iterator[int]:
    """Yields after each kill of `job` in a folder that `before` has prepared; `least`: places that there must be."""
    place = 1
    while True:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        before()
        if not killed(job, place):
            break
        yield place
        place += 1
    assert place > least


def test_a_kill_in_the_first_save_leaves_it_or_nothing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    seen = set()
    for _ in kills(root, lambda: None, lambda: save(root, 1), least=10):
        assert all(durable.fault(folder) is None for folder in all_checkpoints(root))
        durable.repair_all(root)
        seen.add(tuple(path.name for path in root.iterdir()))
        assert check(save(root, 1)) is None, "and it can be saved again"
    assert seen == {(), ("step_000001",)}


def test_a_kill_while_a_step_is_saved_again_leaves_one_of_both(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    seen = set()
    for _ in kills(root, lambda: save(root, 7, examples=1), lambda: save(root, 7, examples=2), least=15):
        durable.repair_all(root)
        assert [path.name for path in root.iterdir()] == ["step_000007"]
        check(root / "step_000007")
        seen.add(load(root / "step_000007").examples)
    assert seen == {1, 2}


@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_one(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    seen = set()
    for _ in kills(root, lambda: save(root, 1), lambda: save(root, 2, keep=1), least=20):
        for folder in all_checkpoints(root):
            check(folder)
        seen.add(newest(tmp_path).name)
        durable.repair_all(root)  # as each start does
        save(root, 3, keep=1)
        assert [path.name for path in root.iterdir()] == ["step_000003"]
    assert seen == {"step_000001", "step_000002"}


def test_any_folder_of_a_run_is_whole_or_absent(tmp_path: Path) -> None:
    """A saved model is opened under the name that a kill has left it with, before a run puts it right."""
    root = tmp_path / "run"

    def write(content: str) -> None:
        with durable.whole(root / "model") as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "weights").write_text(content)

    for _ in kills(root, lambda: write("old"), lambda: write("new"), least=15):
        found = durable.existing(root / "model")
        durable.verify(found)
        assert (found / "deep" / "weights").read_text() in ("old", "new")


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--check", durable.SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 3


# ---------------------------------------------------------------- damaged ones are passed over


def flip(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """`make` something of this name, where a file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def edited(**changes: Any) -> Callable[[Path], None]:
    """state.json with other content, as an older version without checksums may have left it."""

    def damage(folder: Path) -> None:
        (folder / durable.SUMS).unlink()
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))

    return damage


def content(text: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / durable.SUMS).unlink()
        (folder / "state.json").write_bytes(text)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / "model.safetensors"), r"model.*checksum differs"),
    "a flipped bit in the moments": (lambda f: flip(f / "optimizer.safetensors"), r"optimizer.*checksum differs"),
    "a flipped bit in the state": (lambda f: flip(f / "state.json"), r"state\.json.*checksum differs"),
    "a missing file": (lambda f: (f / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "a cut file": (lambda f: os.truncate(f / "optimizer.safetensors", 50), "checksum differs"),
    "an empty file": (lambda f: os.truncate(f / "model.safetensors", 0), "checksum differs"),
    "checksums of nothing": (lambda f: os.truncate(f / durable.SUMS, 0), "SHA256SUMS is empty"),
    "checksums that are no text": (lambda f: (f / durable.SUMS).write_bytes(b"\xff\xfe"), "SHA256SUMS is damaged"),
    "a flipped bit in the checksums": (lambda f: flip(f / durable.SUMS, at=0), "checksum differs"),
    "checksums cut after a line": (lambda f: os.truncate(f / durable.SUMS, 64 + 2 + 18), "SUMS does not list opt"),
    "a folder in the place of the checksums": (in_place_of(durable.SUMS, Path.mkdir), "can't be read: Is a directory"),
    "a folder in the place of a file": (in_place_of("state.json", Path.mkdir), r"state\.json is missing"),
    "a link to nothing": (in_place_of("model.safetensors", lambda f: f.symlink_to("gone")), "model.* is missing"),
    "a link to itself": (in_place_of(durable.SUMS, lambda f: f.symlink_to(f)), "can't be read: Too many levels"),
    "nested too deep": (content(b"[" * 100_000), "is not a checkpoint"),
    "an empty folder": (lambda f: [file.unlink() for file in f.iterdir()], r"state\.json"),
    "{}": (content(b"{}"), "has no 'progress'"),
    "[]": (content(b"[]"), "it does not hold a JSON object"),
    "no text": (content(b"\xff\xfe{"), "is not a checkpoint"),
    "nested too little": (edited(progress=None), "progress is not an object"),
    "an unknown key": (edited(progress={"step": 4, "weather": "fine"}), "weather"),
    "a number as text": (edited(progress={"step": "4"}), "is not a checkpoint"),
    "nothing for a number": (edited(progress={"step": 4, "tokens": None}), "is not a checkpoint"),
    "no optimizer": (edited(optimizer={}), "optimizer lacks param_groups"),
    "the identity of nothing": (edited(identity=[]), "identity is not an object"),
    "another step's name": (edited(progress={"step": 3}), "holds step 3"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], reason: str
) -> None:
    caplog.set_level(logging.WARNING, "vlmtune")
    root = tmp_path / "checkpoints"
    save(root, 2)
    damage(save(root, 4))
    assert newest(tmp_path).name == "step_000002"
    with pytest.raises(CheckpointError, match=reason):
        check(root / "step_000004")
    assert "skipped a damaged checkpoint" in caplog.text
    assert "step_000004" in caplog.text


def test_where_none_is_sound_each_is_named_with_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    flip(save(root, 2) / "state.json")
    (save(root, 4) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path)
    first, *others = caught.value.problems
    assert f"no usable checkpoint: put a sound copy of one back, or delete {root}" in first
    assert len(others) == 2
    assert "step_000004: model.safetensors is missing" in others[0]
    assert "step_000002: state.json is not as it was written" in others[1]


def test_one_that_must_not_be_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "checkpoints", 2)
    refused = save(tmp_path / "checkpoints", 4)
    real = Path.read_text

    def read_text(path: Path, *rest: Any, **options: Any) -> str:  # root may read everything, so no chmod
        if path.parent == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert newest(tmp_path).name == "step_000002"
    assert "step_000004: can't be read: Permission denied" in caplog.text


def test_a_link_to_nothing_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints" / "step_000004").symlink_to("gone")
    assert newest(tmp_path).name == "step_000002"
    assert "step_000004: is no folder with the name of a checkpoint" in caplog.text


def test_what_was_just_written_is_never_deleted(tmp_path: Path) -> None:
    """Not even where a damaged one counts as newer."""
    flip(save(tmp_path, 4) / "state.json")
    assert check(save(tmp_path, 3, keep=1)) is None


@pytest.mark.parametrize("name", ["step_abc", "step_", "step_4", "step_000004 (copy)", "step_000004.zip"])
def test_a_stray_name_is_left_alone_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    root = tmp_path / "checkpoints"
    save(root, 2)
    (root / name).mkdir()
    assert newest(tmp_path).name == "step_000002"
    assert f"{name}: is no folder with the name of a checkpoint" in caplog.text
    save(root, 3, keep=1)
    assert (root / name).is_dir()


def test_a_damaged_one_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    """It is renamed once the run goes on, or the next saves would count it among the newest."""
    root = tmp_path / "checkpoints"
    save(root, 2)
    flip(save(root, 4) / "state.json")
    set_aside(newest(tmp_path))
    save(root, 3, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["step_000003", "step_000004.damaged"]
    assert newest(tmp_path).name == "step_000003"


def test_a_checkpoint_without_checksums_still_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path / "checkpoints", 2, examples=5)
    (folder / durable.SUMS).unlink()
    assert load(newest(tmp_path)).examples == 5
    assert "has no SHA256SUMS, so its files are not checked" in caplog.text


def test_what_cannot_be_deleted_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(durable.shutil, "rmtree", refuse)
    save(tmp_path, 2, keep=1)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_000002"]
    assert "step_000001: can't be deleted" in caplog.text


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """A process that saves on and on, killed 20 times: what it last named as saved is there and sound."""
    program = (
        "import sys; sys.path[:0] = ['src', 'tests']; from pathlib import Path; import test_durable\n"
        "for step in range(1, 10**6): print(test_durable.save(Path(sys.argv[1]), step, keep=1).name, flush=True)"
    )
    for trial in range(20):
        root = tmp_path / str(trial) / "checkpoints"
        with subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            named = [process.stdout.readline().strip() for _ in range(1 + trial % 7)]
            process.kill()
            named += process.stdout.read().split()
        durable.repair_all(root)
        assert newest(root.parent).name >= named[-1]
        for folder in all_checkpoints(root):
            check(folder)
