"""Everything a user can do wrong, as a tree. The scripts print these in one piece and exit with 1, or 2 for usage.

VlmtuneError
├── ConfigError        a key, a value or a combination of them
│   └── UsageError     a command line that can't be read
├── DataError          a file, a row, an image
├── ModelError         a model that can't be found, opened or used this way
├── CheckpointError    saving or loading a run's state
└── TrainingError      the run itself: non-finite loss, out of memory
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class VlmtuneError(Exception):
    """A problem (or several) that the user can solve; the message says how."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


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


class TrainingError(VlmtuneError):
    """The run can't go on."""


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn running out of device memory into an error that says what needs less."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here
            raise
        raise TrainingError(
            "out of device memory. Less is needed with a smaller trainer.batch_size (and more "
            "trainer.gradient_accumulation_steps) or trainer.eval_batch_size, trainer.gradient_checkpointing=true, "
            "model.image.max_tokens=..., adapter=lora or quantization=nf4"
        ) from error


def nearest(word: str, candidates: Iterable[str], *, most: int = 12) -> str:
    """Say which candidates a mistyped word may have meant: `did you mean x?`, else the list of all."""
    names = sorted(map(str, candidates))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    close = close or [name for name in names if len(word) > 2 and name.startswith(word)][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"choose from: {shown}" if names else "nothing can be set here"
