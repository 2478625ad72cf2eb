"""Folders on disk that are complete or absent, and checked when they are read.

A folder is written under a hidden name, gets the checksums of its files as its last file, and only then takes its own
name. A kill at any moment leaves the earlier folder, the new one, or hidden leftovers that `repair` puts right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmtune import display
from vlmtune.errors import DISK_FULL, FULL, CheckpointError, VlmtuneError, system_error
from vlmtune.memory import noted

log = logging.getLogger("vlmtune")

SUMS = "SHA256SUMS"
"""As `sha256sum --check` reads it."""
UNSEALED = f"has no {SUMS}"
LEFTOVER = re.compile(r"\.(.+)\.(partial|old|deleted)")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` only once everything is in it; an older one is replaced.

    Raises CheckpointError, with nothing of it left behind, where the disk refuses.
    """
    partial, old = _hidden(folder, "partial"), _hidden(folder, "old")
    try:
        repair(folder)
        partial.mkdir(parents=True)
        with noted(f"while {folder} was written"):
            yield partial
        _seal(partial)
        if folder.exists():  # aside, not away, until the new one is there
            os.rename(folder, old)
        os.rename(partial, folder)
        for parent in (folder.parent, folder.parent.parent):  # the first folder's parent is new as well
            _sync(parent)
    except VlmtuneError:
        raise
    except Exception as raised:
        if (error := system_error(raised)) is None:
            raise
        reason = f"{DISK_FULL} ({_space(partial)})" if error.errno in FULL else str(error)
        raise CheckpointError(f"{folder}: can't be written: {reason}; earlier checkpoints are untouched") from raised
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists() and old.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def _space(partial: Path) -> str:
    """How much of a folder the disk took, and what it has left."""
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial.parent).free
    return f"it took {display.size(written, 'B')} and needs more, {display.size(free, 'B')} are free"


def remove(folder: Path) -> None:
    """Delete a folder, which loses its name first: half of it never passes for the whole.

    Where the disk refuses, a warning says so and training continues.
    """
    hidden = _hidden(folder, "deleted")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        log.warning("%s: can't be deleted: %s", folder, error)


def repair(folder: Path) -> None:
    """Put right what a kill may have left of `folder`: it gets its name back, and hidden leftovers are deleted."""
    if (found := existing(folder)) != folder:
        os.rename(found, folder)
    for kind in ("partial", "old", "deleted"):
        shutil.rmtree(_hidden(folder, kind), ignore_errors=True)


def repair_all(parent: Path) -> None:
    """`repair` every folder of which there are leftovers in `parent`."""
    leftovers = [LEFTOVER.fullmatch(path.name) for path in (parent.iterdir() if parent.is_dir() else ())]
    for name in sorted({match[1] for match in leftovers if match}):
        repair(parent / name)


def existing(folder: Path) -> Path:
    """`folder`, or the hidden name under which a kill between two renames has left it whole."""
    if folder.exists():
        return folder
    partial, old = _hidden(folder, "partial"), _hidden(folder, "old")
    if partial.is_dir() and fault(partial) is None:  # complete but for its name
        return partial
    return old if old.is_dir() else folder


def names(parent: Path) -> list[str]:
    """What lies in `parent` under its own name, and what `repair_all` would give its name back."""
    found = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    leftovers = {match[1] for name in found if (match := LEFTOVER.fullmatch(name))}
    visible = {name for name in found if not name.startswith(".")}
    return sorted(visible | {name for name in leftovers if existing(parent / name).exists()})


def fault(folder: Path, needed: Collection[str] = ()) -> str | None:
    """What is wrong with the files of a folder that `whole` wrote; None where each is there as it was written.

    `needed`: files that the checksums have to cover.
    """
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}
        for name, checksum in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _checksum(folder / name) != checksum:
                return f"{name} is not as it was written (its checksum differs)"
    except FileNotFoundError:
        return UNSEALED
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except ValueError:  # no text, or no line of two words
        return f"{SUMS} is damaged"
    if not sums:
        return f"{SUMS} is empty"
    return next((f"{SUMS} does not list {name}" for name in needed if name not in sums), None)


def verify(folder: Path, needed: Collection[str] = ()) -> None:
    """Raise CheckpointError where a file of `folder` is not as it was written, or not among the checksums but `needed`.

    Folders of older versions have no checksums; the log says so.
    """
    problem = fault(folder, needed)
    if problem == UNSEALED:
        log.warning("%s: has no %s, so its files are not checked for damage", folder, SUMS)
    elif problem is not None:
        way = f"copy it again, or delete {SUMS} if it was changed on purpose"
        raise CheckpointError(f"{folder}: {problem}; {way}")


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _seal(folder: Path) -> None:
    """Write the checksums, and everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_checksum(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))
    for path in [*files, folder / SUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
