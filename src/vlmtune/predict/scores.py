"""Score a finished run, and write its rows with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.config.schema import Config
from vlmtune.data.splits import Split
from vlmtune.predict.predictor import Predictor
from vlmtune.predict.rows import inputs_of, of_test_rows
from vlmtune.record.outputs import ANSWER, Rows, Scored, output_file, refuse_columns, score_columns, warn_of_formulas

if TYPE_CHECKING:
    from vlmtune.evaluation.evaluate import Evaluation


def evaluate_run(folder: str, config: Config, output: str | None) -> str:
    """Score a finished run on `data.test`, or on its validation rows if that is not set. Returns the scores as a table.

    `output`: a CSV file for the rows with answer_predictions and scores. Raises DataError for rows that can't be used.
    """
    from vlmtune import display
    from vlmtune.batching.layout import Layout
    from vlmtune.data import table
    from vlmtune.evaluation.evaluate import evaluate
    from vlmtune.launch import signals
    from vlmtune.record import slices

    target = None if output is None else output_file(output, inputs_of(config.data), Path(folder))
    split = "validation" if config.data.test is None else "test"
    if split == "test":
        config.data = of_test_rows(config.data)
    with signals.ending_at_once(), display.logging_to(None):
        rows = table.load(config.data, config.task, config.trainer.seed, (split,))[split]
        slices.check(rows, config)
        if target is not None and rows.frame is not None:
            place, ours = str(getattr(config.data, split) or split), score_columns(config.task.metrics)
            refuse_columns(rows.frame.columns, (ANSWER, *ours), place)
        predictor = Predictor(Path(folder), config)
        here = target if predictor.engine.is_main_process else None
        with predictor.at_work(), _scored_rows(here, rows, config.task.metrics) as done:
            found = evaluate(
                predictor.model,
                predictor.encoder,
                rows.records,
                config,
                predictor.engine,
                title="evaluating",
                layout=Layout(share_answers=predictor.shares_answers(rows.records)),
                done=done,
            )
        if target is not None:
            warn_of_formulas(target, found.predictions)
    return _shown(rows, split, found, config)


def _shown(rows: Split, split: str, found: Evaluation, config: Config) -> str:
    """The metrics of all rows, and of each slice."""
    from vlmtune import display
    from vlmtune.record import slices

    title = f"{len(rows)} {split} rows" + (f", {len(rows.bad)} more skipped" if rows.bad else "")
    values = [(name, f"{value:.4f}") for name, value in found.metrics.items()]
    whole = display.table(title, ("metric", "value"), values)
    return "\n".join([whole, *slices.tables(slices.sliced(rows, found, config))])


@contextmanager
def _scored_rows(
    target: Path | None, split: Split, metrics: Sequence[str]
) -> Iterator[Callable[[int, list[str]], None] | None]:
    """Write rows with their scores to `target`, if there is one, as they are answered; scores that depend on other rows
    come when all are.
    """
    from vlmtune.metrics import resolve, score
    from vlmtune.record.runfolder import frame_of

    if target is None:
        yield None
        return
    answers, functions = Scored(frame_of(split), columns=score_columns(metrics)), resolve(metrics)
    whole = not all(getattr(function, "row_by_row", True) for function in functions.values())

    def scored(rows: range) -> None:
        texts = [answers.texts[row] for row in rows]
        found = score(functions, texts, [split.records[row].answers for row in rows])[1]
        answers.scores |= {row: [*scores.values()] for row, scores in zip(rows, found, strict=True)}

    with closing(Rows(target, answers)) as rest:

        def done(start: int, texts: list[str]) -> None:
            answers.texts |= dict(enumerate(texts, start))
            if not whole:
                scored(range(start, start + len(texts)))
            rest.write(start + len(texts))

        yield done
        if whole:
            scored(range(len(split)))
            rest.again()
        rest.finish()
