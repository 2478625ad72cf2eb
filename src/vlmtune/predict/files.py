"""Answer the rows of a table and write them to a CSV file."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

from vlmtune.config.schema import READ_FILES, Config
from vlmtune.data.splits import Records
from vlmtune.errors import ConfigError, DataError
from vlmtune.predict.predictor import Predictor, audited, reasons_of
from vlmtune.predict.rows import inputs_of, of_test_rows
from vlmtune.record.outputs import ANSWER, ERROR, Answers, Rows, output_file, refuse_columns, warn_of_formulas


def predict_file(folder: str, config: Config, output: str) -> int:
    """Answer the rows of `data.test` and write them to the CSV file `output`. Returns how many rows failed.

    Raises ConfigError if `output` can't be written, DataError if the table can't be read or no row can be used: both
    before the model is opened. If it is interrupted later, `output`.partial holds the rows answered so far.
    """
    from vlmtune import display
    from vlmtune.launch import signals

    if config.data.test is None:
        raise ConfigError("data.test: missing; give the CSV file to answer, for instance data.test=test.csv")
    target = output_file(output, inputs_of(config.data), Path(folder))
    with signals.ending_at_once(), display.logging_to(None):
        answers, records, rows = _to_answer(config)
        predictor = Predictor(Path(folder), config)
        with closing(Rows(target, answers)) as rest:
            predictor.fill(answers, records, rows, rest.write)
            _refuse_none(answers, config)
            rest.finish()
        warn_of_formulas(target, answers.texts.values())
    return len(answers.reasons)


def _to_answer(config: Config) -> tuple[Answers, Records, list[int]]:
    """The table of `data.test`, its usable records, and the row number of each record."""
    from vlmtune.data.table import load as load_table
    from vlmtune.data.table import read_files
    from vlmtune.record.runfolder import frame_of

    data = of_test_rows(config.data)
    if data._target_ == READ_FILES:
        frame = read_files(data)["test"]
        refuse_columns(frame.columns, (ANSWER, ERROR), str(data.test))
        split = audited(frame, dataclasses.replace(config, data=data))
        answers = Answers(frame, reasons_of(split))
        _refuse_none(answers, config)
        return answers, split.records, [record.row for record in split.records]
    # a source with its own checks: bad rows are handled by data.on_bad_row
    split = load_table(data, config.task, config.trainer.seed, ("test",), answers_required=False)["test"]
    answers = Answers(frame_of(split))
    refuse_columns(answers.frame.columns, (ANSWER, ERROR), str(data.test))
    return answers, split.records, list(range(len(split)))


def _refuse_none(answers: Answers, config: Config) -> None:
    if len(answers.reasons) == len(answers.frame) > 0:
        first = answers.reasons[min(answers.reasons)]
        raise DataError(f"{config.data.test}: no row can be used; the first has: {first}")
