"""The table of a sweep's trials on a terminal of any size."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vlmtune import display
from vlmtune.trials.overview import Overview
from vlmtune.trials.watched import Watched

STYLES = {"completed": "green", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
SIZES = {
    100: {"#": 4, "trial": 0, "state": 21, "step": 13, "metric": 12, "loss": 8, "time": 12},
    80: {"#": 4, "trial": 0, "state": 13, "step": 13, "metric": 12, "time": 12},
    64: {"#": 4, "trial": 0, "state": 13, "metric": 12, "time": 12},
    0: {"#": 4, "trial": 0, "state": 11, "metric": 8},
}
"""Letters of each column, by how many the terminal has at least; `trial`, what differs, takes those that are left."""
GAP = 2


def draw(overview: Overview, width: int, height: int) -> Group:
    """The trials that `width` letters and `height` lines have room for, and a line about all of them."""
    counts = overview.counts()
    hidden = "; {} trials are not shown"
    lines = 1 + (len(counts) + len(hidden)) // width
    shown = overview.foremost(max(height - lines - 2, 1))  # with the heads, and the line that the cursor is in
    if len(shown) < len(overview.watched):
        counts += hidden.format(len(overview.watched) - len(shown))
    widths = _widths(width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for name, letters in widths.items():
        title = overview.metric if name == "metric" else name
        text = name in ("trial", "state")
        table.add_column(title, justify="left" if text else "right", max_width=letters, no_wrap=True)
    for each in shown:
        best = each is overview.best
        cells = _cells(each, overview.now, widths["state"], best)
        table.add_row(*[cells[name] for name in widths], style="bold" if best else "")
    return Group(table, Text(counts))


def _widths(width: int) -> dict[str, int]:
    """The columns that a terminal has room for."""
    widths = next(columns for least, columns in SIZES.items() if width >= least)
    return widths | {"trial": max(width - sum(widths.values()) - GAP * (len(widths) - 1), 4)}


def _cells(each: Watched, now: float, letters: int, best: bool) -> dict[str, RenderableType]:
    """What each column shows of a trial; `letters`: of its state."""
    trial = each.trial
    steps = f"{each.step}/{each.total}" if each.total else str(each.step or "-")
    left = each.left(now) if trial.state == "running" else None
    time = f"{display.duration(left)} left" if left else ""
    return {
        "#": str(trial.number),
        "trial": Text(trial.label or "-"),
        "state": _state(each, letters),
        "step": steps,
        "metric": ("-" if each.metric is None else f"{each.metric:.4f}") + (" *" if best else "  "),
        "loss": "-" if each.loss is None else f"{each.loss:.4f}",
        "time": time if trial.seconds is None else display.duration(trial.seconds),
    }


def _state(each: Watched, letters: int) -> RenderableType:
    """A bar during the steps, else what it does or how it ended."""
    state = each.trial.state
    if state == "running":
        if each.total > each.step:
            return ProgressBar(each.total, each.step, width=letters)
        return Text("finishing" if each.step else "starting")
    text = f"failed: {each.failure}" if state == "failed" else state
    return Text(text if len(text) <= letters else each.failure, style=STYLES[state])
