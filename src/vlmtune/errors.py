"""Everything a user can do wrong, as a tree. The scripts print these in one piece and exit with 1, or 2 for usage.

VlmtuneError
├── ConfigError        a key, a value or a combination of them
│   └── UsageError     a command line that can't be read
├── DataError          a file, a row, an image
├── ModelError         a model that can't be found, opened or used this way
├── CheckpointError    saving or loading a run's state
├── StorageError       a disk, a folder, a pipe that refuses
└── TrainingError      the run itself
    ├── LostProcess    another process of the run is gone
    ├── Killed         a trial of a sweep was ended by a signal
    ├── TimeLimit      a trial of a sweep took too long
    ├── OutOfMemory    the device or the machine has no more memory (memory.py)
    └── NonFinite      the loss, the gradient or a weight is NaN or infinite
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class VlmtuneError(Exception):
    """A problem (or several) that the user can solve; the message says how."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes an error stays a list of problems."""
        return type(self).__new__, (type(self), self.problems), self.__dict__ | {"args": self.args}


class ConfigError(VlmtuneError):
    """A key, a value or a combination of them does not work."""


class UsageError(ConfigError):
    """A command line can't be read at all; the exit code is 2."""


class DataError(VlmtuneError):
    """A file, a row or an image can't be used."""


class ModelError(VlmtuneError):
    """A model can't be found, opened or used this way."""


class CheckpointError(VlmtuneError):
    """A run's state can't be written or read."""


class StorageError(VlmtuneError):
    """A disk, a folder or a pipe refuses to be written or read."""


class TrainingError(VlmtuneError):
    """The run can't continue."""


class LostProcess(TrainingError):
    """Another process of the run is gone, without a word."""


class Killed(TrainingError):
    """A trial of a sweep was ended by a signal, and left no result."""


class TimeLimit(TrainingError):
    """A trial of a sweep took longer than it may."""


class OutOfMemory(TrainingError):
    """The device or the machine has no more memory."""


class NonFinite(TrainingError):
    """The loss, the gradient or a weight is NaN or infinite, and the run is to stop."""


def failure_of(error: BaseException) -> str:
    """The class of a failure, by which the trials of a sweep are told apart."""
    classes: dict[type[VlmtuneError], str] = {
        OutOfMemory: "out_of_memory",
        NonFinite: "not_finite",
        LostProcess: "killed",
        Killed: "killed",
        TimeLimit: "time",
        DataError: "data",
        ConfigError: "config",
    }
    own = next((name for kind, name in classes.items() if isinstance(error, kind)), "other")
    return own if isinstance(error, Exception) else "killed"


def of_kind(name: str, problems: Sequence[str]) -> VlmtuneError:
    """An error of another process, by its class's name; a TrainingError for classes that are not ours."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, VlmtuneError):
        return kind(problems)
    return TrainingError(problems if not name else [f"{name}: {problems[0]}", *problems[1:]])


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL = "the disk is full, or a limit on file sizes is reached"
PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE)
"""Of the folder or the disk, whatever the program does; a file that is missing may be a fault of the program."""


def system_error(error: Exception) -> OSError | None:
    """What the system refused: the error itself, or the one that safetensors and tokenizers wrap in their own."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


@contextmanager
def naming(path: object) -> Iterator[None]:
    """An OSError that leaves the context names this file if it names none, as one from `write` does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def storage_advice() -> Iterator[None]:
    """Turn a disk's or a folder's refusal into an error of one sentence."""
    try:
        yield
    except VlmtuneError:
        raise
    except Exception as raised:
        if (error := system_error(raised)) is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        reason = (error.strerror or str(error)).lower()
        if error.errno in FULL:
            raise StorageError(f"{place}{DISK_FULL} ({reason})") from raised
        if error.errno in PLACES:
            raise StorageError(f"{place}can't be used: {reason}") from raised
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise StorageError(f"{place}too many open files; raise the limit (ulimit -n)") from raised
        if error.errno == errno.ENOMEM:
            raise MemoryError from raised
        raise


EXTRAS = {
    "datasets": "hub",
    "pyarrow": "hub",
    "tensorboard": "tensorboard",
    "num2words": "smolvlm",
    "ray": "ray",
    "hydra-submitit-launcher": "slurm",
}
"""Packages that only some runs need, and the extra of vlmtune that brings each."""


def to_install(package: str) -> str:
    """The command that brings a missing package: `pip install 'vlmtune[hub]'`, or the package by its own name."""
    return f"pip install 'vlmtune[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def nearest(word: str, candidates: Iterable[str], *, most: int = 12) -> str:
    """Say which candidates a mistyped word may have meant: `did you mean x?`, else the list of all."""
    names = sorted(map(str, candidates))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    close = close or [name for name in names if len(word) > 2 and name.startswith(word)][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"choose from: {shown}" if names else "nothing can be set here"
