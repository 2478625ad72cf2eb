"""How a command ends: one message for a user's mistake, and an exit code.

0: done; 1: failed; 2: invalid command line; 128 + n: ended by signal n (130: Ctrl-C).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vlmtune.errors import ConfigError, DataError, UsageError, VlmtuneError, storage_advice
from vlmtune.launch.signals import Interrupted
from vlmtune.memory import memory_advice


def guard(job: Callable[[], int], *, quiet: bool = False) -> int:
    """Run `job`. A user's mistake is printed as one message, without a traceback unless VLMTUNE_TRACEBACK is set.

    `quiet`: print nothing, as another process does.
    """
    try:
        with memory_advice(), storage_advice():
            return job()
    except VlmtuneError as error:
        if os.environ.get("VLMTUNE_TRACEBACK"):
            traceback.print_exc()
        if not quiet:
            say(message(error), sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as error:
        if not quiet:
            say(error, sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        return 130
    except Exception:
        if not quiet:
            traceback.print_exc()
        return 1


def message(error: VlmtuneError) -> str:
    """`error: ...`, or a list of problems, one per line."""
    kinds = {UsageError: "usage ", ConfigError: "config ", DataError: "data "}
    label = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "") + "error"
    if len(error.problems) == 1:
        return f"{label}: {error.problems[0]}"
    return "\n".join([f"{label}: {len(error.problems)} problems", *(f"  - {problem}" for problem in error.problems)])


def say(text: object, stream: Any = None) -> None:
    """Print, ignoring a closed stream."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def leave(code: int) -> None:
    """End the process with this exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # the reader is gone; Python would flush again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
