"""Score a finished run, and write its rows with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from vlmtune.config.schema import Config
from vlmtune.data.splits import Split
from vlmtune.predict.predictor import Predictor
from vlmtune.predict.rows import inputs_of, of_test_rows
from vlmtune.record.outputs import ANSWER, SCORE, Rows, Scored, output_file, refuse_columns, warn_of_formulas


def evaluate_run(folder: str, config: Config, output: str | None) -> str:
    """Score a finished run on `data.test`, or on its validation rows if that is not set. Returns the scores as a table.

    `output`: a CSV file for the rows with answer_predictions and score. Raises DataError for rows that can't be used.
    """
    from vlmtune import display
    from vlmtune.batching.layout import Layout
    from vlmtune.data import table
    from vlmtune.evaluation.evaluate import evaluate
    from vlmtune.launch import signals

    target = None if output is None else output_file(output, inputs_of(config.data), Path(folder))
    split = "validation" if config.data.test is None else "test"
    if split == "test":
        config.data = of_test_rows(config.data)
    with signals.ending_at_once(), display.logging_to(None):
        rows = table.load(config.data, config.task, config.trainer.seed, (split,))[split]
        if target is not None and rows.frame is not None:
            refuse_columns(rows.frame.columns, (ANSWER, SCORE), str(getattr(config.data, split) or split))
        predictor = Predictor(Path(folder), config)
        here = target if predictor.engine.is_main_process else None
        with predictor.at_work(), _scored_rows(here, rows, config.task.metrics[0]) as done:
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
    title = f"{len(rows)} {split} rows" + (f", {len(rows.bad)} more skipped" if rows.bad else "")
    return display.table(title, ("metric", "value"), [(name, f"{value:.4f}") for name, value in found.metrics.items()])


@contextmanager
def _scored_rows(target: Path | None, split: Split, metric: str) -> Iterator[Callable[[int, list[str]], None] | None]:
    """Write rows with their scores to `target`, if there is one, as they are answered."""
    from vlmtune.metrics import resolve
    from vlmtune.record.runfolder import frame_of

    if target is None:
        yield None
        return
    answers, [function] = Scored(frame_of(split)), resolve([metric]).values()
    with closing(Rows(target, answers)) as rest:

        def done(start: int, texts: list[str]) -> None:
            for row, text in enumerate(texts, start):
                answers.texts[row] = text
                answers.scores[row] = float(function(text, list(split.records[row].answers)))
            rest.write(start + len(texts))

        yield done
        rest.finish()
