"""The Python way in: `vlmtune.train([...])` and `vlmtune.load(folder).predict(dataframe)`."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmtune.config.schema import Config, DataConfig
from vlmtune.data.splits import Records, Split
from vlmtune.errors import ConfigError, DataError, TrainingError, VlmtuneError, memory_advice, storage_advice
from vlmtune.predict.predictor import Predictor, audited, reasons_of
from vlmtune.record.outputs import (
    ANSWER,
    ERROR,
    SCORE,
    Answers,
    Rows,
    Scored,
    output_file,
    refuse_columns,
    tell_formulas,
)

log = logging.getLogger("vlmtune")


def train(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one training, as `python src/train.py ...overrides` does, and return what its result.json holds, with the
    run's `folder`.

    >>> vlmtune.train(["model=qwen2vl_7b", "adapter=lora", "data=csv", "data.train=my.csv"])  # doctest: +SKIP

    Raises VlmtuneError (ConfigError, DataError, ...).
    """
    from vlmtune.config import compose

    config, composed = compose.read("train", overrides)
    folder = Path(config.resume or composed.hydra.run.dir).absolute()
    result = run_in(folder, config)
    return {**result, "folder": str(folder)}


def run_in(folder: Path, config: Config) -> dict[str, Any]:
    """Run `config` in `folder`, and leave a result.json there whatever happens.

    Raises ConfigError where the folder holds another run, and whatever ends the run early: on several processes the
    error of the one that failed first.
    """
    from vlmtune import display
    from vlmtune.config import saved
    from vlmtune.launch import lock, ranks, signals, surroundings
    from vlmtune.record import environment

    environment.PEAK.start()
    if ranks.rank() != 0:
        with surroundings.kept(), display.logging_to(None), signals.ending_at_once(), _telling():
            return _trained(config, None)
    with storage_advice():
        check_free(folder, config)
        if config.resume:
            saved.refuse_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with lock.held(folder):
            return _run_alone(folder, config)


def _run_alone(folder: Path, config: Config) -> dict[str, Any]:
    """As `run_in`, in a folder that no other process uses."""
    from vlmtune import display, durable
    from vlmtune.launch import signals, surroundings
    from vlmtune.record import runfolder

    for parent in (folder, folder / "checkpoints"):
        durable.repair_all(parent)
    if not config.resume:  # a resumed run's files are touched once it is known to be the same run
        if (folder / "base").exists():  # of a start that failed, perhaps with another seed
            durable.remove(folder / "base")
        runfolder.write_config(folder / "config.yaml", config)
        for left_over in ("quarantine.csv", "result.json"):
            (folder / left_over).unlink(missing_ok=True)
    with surroundings.kept(), display.logging_to(folder), signals.ending_at_once(), _failure_written(folder):
        result = _trained(config, folder)
        gc.collect()  # libraries leave cycles (torch.fx of the frame that imported it) that hold the model
        if config.preflight == "only" and not config.resume:  # or the run that was looked at loses its own result
            runfolder.write_json(folder / "result.json", result)
        return result


@memory_advice()
def _trained(config: Config, folder: Path | None) -> dict[str, Any]:
    """One run: from rows to a fine-tuned model in `folder`, which is None on processes other than the first."""
    from vlmtune.data import table

    splits = table.load(config.data, config.task, config.trainer.seed)  # audited before anything heavy is imported
    if config.trainer.best_metric and "validation" not in splits:
        raise ConfigError("trainer.best_metric: needs rows to evaluate; set data.validation(_fraction)")
    log.info("fine-tuning %s for %s", config.model.name, config.task.name)
    from vlmtune import run

    built = run.build(config, splits, folder)
    if config.preflight == "only":
        return {"status": "preflight", "steps": 0}
    return run.fit(built)


@contextmanager
def _telling() -> Iterator[None]:
    """An error on a rank other than the first is told to the first one."""
    from vlmtune.launch import ranks

    try:
        with memory_advice(), storage_advice():
            yield
    except Exception as error:
        ranks.tell(error)
        raise


@contextmanager
def _failure_written(folder: Path) -> Iterator[None]:
    """What ends a run early becomes its result.json, unless one stands there already."""
    from vlmtune.data.bad_rows import BadRowsError, write_quarantine
    from vlmtune.launch import signals
    from vlmtune.record import runfolder

    try:
        with memory_advice(), storage_advice():
            yield
    except BaseException as raised:
        with signals.Wish().watching():  # where another rank failed, the launcher's signal comes just now
            error = _first_error(raised)
            with suppress(OSError):  # on a full disk the error itself matters more
                if isinstance(error, BadRowsError):
                    write_quarantine(folder / "quarantine.csv", error.bad)
                if not (folder / "result.json").exists():
                    runfolder.write_failure(folder, error)
        if error is raised:
            raise
        raise error from raised


def _first_error(error: BaseException) -> BaseException:
    """Where another rank failed first, its error in place of the connection that broke, or of the launcher's signal."""
    from vlmtune.launch import ranks, signals

    follows = isinstance(error, Exception | signals.Interrupted) and not isinstance(error, VlmtuneError)
    if not follows or not ranks.several():
        return error
    silent = TrainingError(ranks.SILENT) if ranks.is_broken_connection(error) else None
    return ranks.told() or silent or error


def check_free(folder: Path, config: Config) -> None:
    """Raise ConfigError where a running process uses the folder, or where it holds a run that this one does not resume.

    A run that failed or was killed before it saved anything is no obstacle.
    """
    from vlmtune import durable
    from vlmtune.launch import lock
    from vlmtune.record.runfolder import read_result

    lock.check(Path(config.resume).expanduser() if config.resume else folder)
    if config.resume or not (folder / "config.yaml").exists():
        return
    killed = "killed" if (folder / lock.NAME).exists() else None  # a run of ours that nothing runs any more
    status = (read_result(folder) or {"status": killed})["status"]
    saved = [*durable.names(folder / "checkpoints"), *({"model"} & {*durable.names(folder)})]
    if saved or status not in ("failed", "interrupted", "preflight", "killed"):
        raise ConfigError(f"{folder}: holds a run already; choose another hydra.run.dir, or resume it: resume={folder}")


def load(folder: str | Path, *, overrides: Sequence[str] = ()) -> Predictor:
    """Open a finished run (its folder, or the `model/` in it) to answer questions.

    `overrides`: keys of the run's config to change, for instance `["generation.max_new_tokens=32"]`. The folder of the
    run's own images, `data.image_root`, counts only where it is among them: other tables have other images.
    Raises CheckpointError: no run there; ModelError: its base model can't be opened.
    """
    from vlmtune.config.compose import names, normalise, saved_config
    from vlmtune.config.paths import home
    from vlmtune.config.strict import strict

    path = Path(home(str(folder)))
    path = path.parent if path.name == "model" and (path.parent / "config.yaml").exists() else path
    usable, problems = normalise(overrides)
    if problems:
        raise ConfigError(problems)
    config = strict(saved_config(path, usable))
    if not names(usable, "data.image_root"):
        config.data.image_root = None
    return Predictor(path, config)


def predict_file(folder: str, config: Config, output: str) -> int:
    """Answer the rows of `data.test` into the CSV file `output`; returns how many rows failed.

    Raises ConfigError where `output` can't be written, DataError where the table can't be read or no row can be used:
    all before the model is opened. What ends it later leaves the rows answered so far in `output`.partial.
    """
    from vlmtune import display
    from vlmtune.launch import signals

    if config.data.test is None:
        raise ConfigError("data.test: missing; give the CSV file to answer, for instance data.test=test.csv")
    target = output_file(output, inputs_of(config.data), Path(folder))
    with display.logging_to(None), signals.ending_at_once():
        answers, records, rows = _to_answer(config)
        predictor = Predictor(Path(folder), config)
        with closing(Rows(target, answers)) as rest:
            predictor.fill(answers, records, rows, rest.write)
            _refuse_none(answers, config)
            rest.finish()
        tell_formulas(target, answers.texts.values())
    return len(answers.reasons)


def _to_answer(config: Config) -> tuple[Answers, Records, list[int]]:
    """The table of `data.test`, its usable records, and the row of each."""
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
    # audited by itself: what can't be used is told by its policy
    split = load_table(data, config.task, config.trainer.seed, ("test",), answers_required=False)["test"]
    answers = Answers(frame_of(split))
    refuse_columns(answers.frame.columns, (ANSWER, ERROR), str(data.test))
    return answers, split.records, list(range(len(split)))


def _refuse_none(answers: Answers, config: Config) -> None:
    if len(answers.reasons) == len(answers.frame) > 0:
        first = answers.reasons[min(answers.reasons)]
        raise DataError(f"{config.data.test}: no row can be used; the first: {first}")


def inputs_of(data: DataConfig) -> list[str]:
    """The files that the config reads."""
    values = (getattr(data, split) for split in ("train", "validation", "test"))
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]


READ_FILES = "vlmtune.data.table.read_files"


def of_test_rows(data: DataConfig) -> DataConfig:
    """The config for reading `data.test` alone: a file, or a data set of a hub where the run trained on such."""
    from vlmtune.config.paths import files_of
    from vlmtune.data.sources.files import is_table

    own = dataclasses.replace(data, train=None, validation=None, validation_fraction=0.0)
    hub = data._target_ == "vlmtune.data.sources.hub.load" and not all(map(is_table, files_of(data.test)))
    return own if hub else dataclasses.replace(own, _target_=READ_FILES)


def evaluate_run(folder: str, config: Config, output: str | None) -> str:
    """Score a finished run on `data.test`, or on its validation rows without one; returns the scores as a table.

    `output`: a CSV file for the rows with answer_predictions and score. Raises DataError for rows that can't be used.
    """
    from vlmtune import display
    from vlmtune.data import table
    from vlmtune.evaluation.evaluate import evaluate
    from vlmtune.launch import signals

    target = None if output is None else output_file(output, inputs_of(config.data), Path(folder))
    split = "validation" if config.data.test is None else "test"
    if split == "test":
        config.data = of_test_rows(config.data)
    with display.logging_to(None), signals.ending_at_once():
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
                share_answers=predictor.shares_answers(rows.records),
                done=done,
            )
        if target is not None:
            tell_formulas(target, found.predictions)
    title = f"{len(rows)} {split} rows" + (f", {len(rows.bad)} more left out" if rows.bad else "")
    return display.table(title, ("metric", "value"), [(name, f"{value:.4f}") for name, value in found.metrics.items()])


@contextmanager
def _scored_rows(target: Path | None, split: Split, metric: str) -> Iterator[Callable[[int, list[str]], None] | None]:
    """Writes rows with their scores as they are answered, into `target` if there is one."""
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


__all__ = ["Predictor", "evaluate_run", "load", "predict_file", "run_in", "train"]
