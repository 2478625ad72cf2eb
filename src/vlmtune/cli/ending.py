"""How a command ends: a user's mistake in one piece, and an exit code that says how it went.

0: done; 1: failed; 2: the command line can't be read; 128 + n: ended by signal n (130 by Ctrl-C).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vlmtune.errors import ConfigError, DataError, UsageError, VlmtuneError, memory_advice, storage_advice
from vlmtune.launch.signals import Interrupted


def guard(job: Callable[[], int]) -> int:
    """Run `job`; a user's mistake is printed in one piece, without a traceback unless VLMTUNE_TRACEBACK is set."""
    try:
        with memory_advice(), storage_advice():
            return job()
    except VlmtuneError as error:
        if os.environ.get("VLMTUNE_TRACEBACK"):
            traceback.print_exc()
        say(message(error), sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as error:
        say(error, sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def message(error: VlmtuneError) -> str:
    """`error: ...`, or a list of problems."""
    kinds = {UsageError: "usage ", ConfigError: "config ", DataError: "data "}
    label = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "") + "error"
    if len(error.problems) == 1:
        return f"{label}: {error.problems[0]}"
    return "\n".join([f"{label}: {len(error.problems)} problems", *(f"  - {problem}" for problem in error.problems)])


def say(text: object, stream: Any = None) -> None:
    """Print to whoever still reads."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def leave(code: int) -> None:
    """End the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # nobody reads any more; Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
