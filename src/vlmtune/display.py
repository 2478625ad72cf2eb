"""What a person sees during a run: log lines, a progress bar, tables."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vlmtune.errors import VlmtuneError

log = logging.getLogger("vlmtune")
own = logging.getLogger("vlmtune.own")
"""For warnings about what only this process does: those of all others than the first rank are shown too."""
own.setLevel(logging.WARNING)


class StandardError(io.TextIOBase):
    """Standard error as it is at each moment. What nobody reads any more (a closed pipe, a terminal that went away) is
    dropped, as a run is worth more than its lines.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            if sys.stderr is not None:  # during a bar, rich puts a proxy there that writes to us
                getattr(sys.stderr, "rich_proxied_file", sys.stderr).write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stderr, "encoding", None) or "utf-8"


console = Console(file=StandardError())  # type: ignore[arg-type]  # rich writes and flushes it, no more
SECONDS_BETWEEN_LINES = 10.0
"""Where no terminal shows a bar, a line like it is logged this often at most."""


LOGGED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) ")
"""How a message in train.log begins; it may have further lines."""


class TrainLog(logging.FileHandler):
    """train.log; if the disk refuses a line, the screen says so once and the run continues."""

    refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.refused:
            self.refused = True
            log.warning("%s can't be written; the run continues without it: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):  # what a full disk did not take
            super().close()


@contextmanager
def logging_to(folder: Path | None, *, other_rank: bool = False) -> Iterator[None]:
    """Log to the console, and in full to `folder/train.log`, the error that ends the block too; without a folder only
    warnings. `other_rank`: the first rank says the same, so only `own` warnings, and no bars. The logger is afterwards
    as it was.
    """
    screen: logging.Handler
    if console.is_terminal and not other_rank:
        screen = RichHandler(
            console=console, show_path=False, show_level=False, omit_repeated_times=False, markup=False
        )
    else:
        screen = logging.StreamHandler(console.file)
    screen.setFormatter(logging.Formatter("%(message)s"))
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        file = TrainLog(folder / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    level, propagate, quiet = log.level, log.propagate, console.quiet
    log.setLevel(logging.ERROR if other_rank else logging.WARNING if folder is None else logging.INFO)
    console.quiet = other_rank
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        if folder is not None:  # the screen gets it from the script, or from Python
            bug = isinstance(error, Exception) and not isinstance(error, VlmtuneError)
            text = f"{type(error).__name__}: {error}"
            file.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), sys.exc_info() if bug else None))
        raise
    finally:
        log.setLevel(level)
        log.propagate, console.quiet = propagate, quiet
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def say(text: str) -> None:
    """Show a line of text, or several, in a process that logs nothing itself."""
    console.file.write(text + "\n")
    console.file.flush()


class Followed:
    """Shows what another process writes to its train.log. The error that ends it is left to the process that reports
    it; of one that it went on after, the first line is shown.
    """

    def __init__(self, path: Path):
        self.path, self.read = path, path.stat().st_size if path.exists() else 0
        self.level, self.error = "", ""

    def show(self) -> None:
        """Show the whole lines that are new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            text = file.read().rpartition(b"\n")[0]
        self.read += len(text) + 1 if text else 0
        for line in text.decode("utf-8", "replace").splitlines():
            self._show(line)

    def _show(self, line: str) -> None:
        if begun := LOGGED.match(line):
            if self.error:
                say(self.error)
            self.level, line = begun[1], line[begun.end() :]
            self.error = line if self.level == "ERROR" else ""
        if self.level != "ERROR":
            say(line)


@contextmanager
def bar(title: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance(by=1, note="")`. Where there is no terminal, a line now and then.

    `done`: of `total`, what an earlier session did.
    """
    first = done
    began = last = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    live = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True)
    visible = show and console.is_terminal

    def advance(by: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += by
        if visible:
            live.update(task, advance=by, note=note)
        elif show and done > first and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = (last - began) / (done - first) * (total - done)
            log.info("%s %d/%d, %s left  %s", title, done, total, duration(left), note)

    if not visible:
        yield advance
        return
    with live:
        task = live.add_task(title, total=total, completed=first, note="")
        yield advance


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column left-aligned, the others right-aligned."""
    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(made, markup=False)
    return "\n" + "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def duration(seconds: float) -> str:
    """`0:42`, `12:05` or `3:07:00`."""
    minutes, secs = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def size(count: float, unit: str = "") -> str:
    """A large number in three digits: `1.53 B` (billion), with a unit `1.53 GB`."""
    for factor, letter in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}".strip()
