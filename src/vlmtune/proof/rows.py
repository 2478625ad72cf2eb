"""Checks every row against the model before the first step: its processor, its embedding, its context length.

A row that fails is a bad row like any other: `data.on_bad_row` decides whether the run stops or continues without it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field

from vlmtune.config.schema import Config
from vlmtune.data.bad_rows import BadRowsError, refusals
from vlmtune.data.records import Record
from vlmtune.data.splits import RecordList, Records, Split
from vlmtune.prompt.encode import Encoder
from vlmtune.proof.notices import log_date, log_markers, warn_of_long_references
from vlmtune.proof.row_checker import Limits, RowChecker, texts_of

log = logging.getLogger("vlmtune")


@dataclass
class Checked:
    """The result of the checks."""

    sentence: str
    longest: list[int] = field(default_factory=list)
    """Numbers of training rows, one of which is the longest."""
    shapes: list[Record] = field(default_factory=list)
    """One training row of each shape of conversation, and rows whose answers begin or end unusually."""


def check_rows(encoder: Encoder, splits: dict[str, Split], config: Config, limits: Limits) -> Checked:
    """Move rows that this model can't process to the bad rows of their split. Streamed rows are checked when they come.

    Raises ModelError if every row needs tokens beyond the model's embedding, and BadRowsError if `data.on_bad_row` and
    `data.max_bad_fraction` don't allow the run to continue.
    """
    checker = RowChecker(encoder, limits)
    checker.check_tokenizer()
    problems, count = [], 0
    longest: list[int] = []
    for name, split in splits.items():
        if split.records.streamed:
            split.records = split.records.refusing(checker.faults_of)
            continue
        reasons, bounds = checker.check_all(split.records)
        if name == "train":
            usable = [n for n in range(len(bounds)) if n not in reasons]
            by_length = sorted(range(len(usable)), key=lambda place: bounds[usable[place]], reverse=True)
            longest = by_length[:LONGEST]  # their numbers once the others are set apart
        if reasons:
            _set_apart(split, reasons)
            problems += refusals(name, split, config.data)
        count += len(split.records)
    if problems:
        raise BadRowsError(problems, [row for split in splits.values() for row in split.bad])
    train = splits["train"].records if "train" in splits and not splits["train"].records.streamed else RecordList([])
    log_date(encoder)
    log_markers(encoder, splits)
    warn_of_long_references(encoder, splits, config.generation.max_new_tokens)
    most = f" of {limits.positions} tokens" if limits.positions else ""
    return Checked(
        f"rows       {count} fit the processor, the embedding and the context{most}", longest, examples(encoder, train)
    )


def examples(encoder: Encoder, records: Records) -> list[Record]:
    """The first row of each shape of conversation and of each way in which texts begin and end: rows that template and
    tokenizer may treat differently.
    """
    found: dict[Hashable, Record] = {}
    for record in records[:1000] if records.on_demand else records:
        key = (encoder.prompt.shape(record), *(_edges(text) for text in texts_of(record)[-2:]))
        if key not in found and len(found) < EXAMPLES:
            found[key] = record
    return list(found.values())


EXAMPLES = 16
"""The most rows of different form that are checked one by one."""


def _edges(text: str) -> tuple[str, str]:
    """The class of a text's first and last character: a letter, a digit, or the character itself."""
    return _character_class(text[:1]), _character_class(text[-1:])


def _character_class(character: str) -> str:
    return "a" if character.isalpha() else "0" if character.isdigit() else character


LONGEST = 8
"""Number of candidates for the longest row, which are tokenized."""


def _set_apart(split: Split, reasons: dict[int, str]) -> None:
    split.bad += [split.records[number].refused(reason) for number, reason in reasons.items()]
    split.records = split.records.select([n for n in range(len(split.records)) if n not in reasons])
