"""What happens to rows that can't be used, and to repeated rows: stop, or continue without them."""

from __future__ import annotations

import csv
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from vlmtune.config.schema import DataConfig
from vlmtune.data.records import BadRow, Record
from vlmtune.data.rows import SHOWN
from vlmtune.data.splits import Split
from vlmtune.errors import DataError

log = logging.getLogger("vlmtune")


class BadRowsError(DataError):
    """Some rows can't be used and the policy is to stop. `bad` has all of them; the message the first of each file."""

    def __init__(self, problems: Sequence[str], bad: list[BadRow]):
        super().__init__(problems)
        self.bad = bad


def write_quarantine(path: Path, bad: Sequence[BadRow]) -> None:
    """Write bad rows as CSV with the columns file, line, row, reason; `line` is empty for rows without one."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "line", "row", "reason"])
        writer.writerows([row.file, row.line or "", row.row, row.reason] for row in bad)


def refusals(name: str, split: Split, config: DataConfig) -> list[str]:
    """Why the policy refuses this split; empty if it doesn't."""
    total = len(split.records) + len(split.bad)
    if total == 0:
        return [f"{name}: has no rows"]
    if not split.bad:
        return []
    share = len(split.bad) / total
    summary = f"{split.bad[0].file}: {len(split.bad)} of {total} rows can't be used ({_kinds(split.bad)})"
    if config.on_bad_row == "fail":
        advice = "Correct them, or skip them with data.on_bad_row=drop; quarantine.csv then lists all of them."
        return [summary, *_first(split.bad), advice]
    if share > config.max_bad_fraction or share == 1:
        limit = f"above data.max_bad_fraction={config.max_bad_fraction:g}" if share < 1 else "no row is left"
        return [f"{summary}; {limit}", *_first(split.bad)]
    return []


def _kinds(bad: Sequence[BadRow]) -> str:
    reasons = (re.sub(r"^message \d+: ", "", row.reason) for row in bad)
    kinds = Counter(re.split(r":|\b\d", reason)[0].strip(" (") for reason in reasons)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _first(bad: Sequence[BadRow]) -> list[str]:
    """The first faults, each once, with its first row and the number of other rows."""
    alike: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        alike.setdefault((row.file, row.reason), []).append(row)
    several = len({row.file for row in bad}) > 1
    shown = []
    for (file, reason), rows in islice(alike.items(), SHOWN):
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        shown.append(f"  {f'{file}, ' if several else ''}{rows[0].place}{more}: {reason}")
    left = sum(map(len, islice(alike.values(), SHOWN, None)))
    shown += [f"  and {left} more rows"] if left else []
    missing = any("no such image" in row.reason for row in bad)
    return shown + (["Relative image paths start at data.image_root, else at the table's folder."] if missing else [])


# ---------------------------------------------------------------- repeated rows


def _repeats(split: Split, most: int | None = None) -> list[BadRow]:
    """Rows that repeat an earlier one, as bad rows."""
    pairs = ((split.records[at], split.records[original]) for at, original in split.repeats[:most])
    return [record.refused(f"duplicate of {_other(record, first)}") for record, first in pairs]


def _other(record: Record, first: Record) -> str:
    place = first.refused("").place
    return place if first.file == record.file else f"{first.file}, {place}"


def repeats_refused(name: str, split: Split, config: DataConfig, bad: list[BadRow]) -> list[str]:
    """Why data.on_duplicate=fail refuses this split; empty if it doesn't. `bad` gets the repeated rows."""
    if not split.repeats or config.on_duplicate != "fail":
        return []
    rows = _repeats(split)
    bad += rows
    summary = f"{name}: {len(rows)} of {len(split.records)} rows repeat an earlier one"
    return [summary, *_first(rows), "data.on_duplicate=keep uses them, drop skips them."]


def without_repeats(name: str, split: Split, config: DataConfig) -> Split:
    """Apply data.on_duplicate to a split, and log what happens to repeated rows."""
    if not split.repeats:
        return split
    [first] = _repeats(split, most=1)
    found = f"{name}: {len(split.repeats)} of {len(split.records)} rows repeat an earlier one"
    example = f"{first.file}, {first.place} is a {first.reason}"
    if config.on_duplicate == "keep":
        log.info("%s (%s); they are used; data.on_duplicate=drop skips them", found, example)
        return dataclasses.replace(split, repeats=[])
    log.info("%s (%s); they are skipped (data.on_duplicate=drop)", found, example)
    repeated = {at for at, _ in split.repeats}
    kept = split.records.select([at for at in range(len(split.records)) if at not in repeated])
    return Split(kept, split.frame, split.bad + _repeats(split))
