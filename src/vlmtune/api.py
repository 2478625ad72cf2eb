"""The Python way in: `vlmtune.train([...])` and `vlmtune.load(folder).predict(dataframe)`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config import Config, DataConfig
from vlmtune.data.records import BadRow, Split
from vlmtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd


def train(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one training, as `python src/train.py ...overrides` does, and return what its result.json holds, with the
    run's `folder`.

    >>> vlmtune.train(["model=qwen2vl_7b", "adapter=lora", "data=csv", "data.train=my.csv"])  # doctest: +SKIP

    Raises VlmtuneError (ConfigError, DataError, ...).
    """
    from vlmtune import compose

    config, composed = compose.read("train", overrides)
    folder = Path(config.resume or composed.hydra.run.dir).absolute()
    result = run_in(folder, config)
    return {**result, "folder": str(folder)}


def run_in(folder: Path, config: Config) -> dict[str, Any]:
    """Run `config` in `folder`, and leave a result.json there whatever happens.

    Raises ConfigError where the folder holds another run, and whatever ends the run early.
    """
    from vlmtune import display, lock, run

    if int(os.environ.get("RANK", 0)) != 0:
        with display.logging_to(None):
            return run.train(config, None)
    check_free(folder, config)
    with lock.held(folder):
        return _run_alone(folder, config)


def _run_alone(folder: Path, config: Config) -> dict[str, Any]:
    """As `run_in`, in a folder that no other process uses."""
    from vlmtune import display, durable, run, runfolder, signals
    from vlmtune.data.table import BadRowsError, write_quarantine

    for parent in (folder, folder / "checkpoints"):
        durable.repair_all(parent)
    if not config.resume:  # a resumed run's files are touched once it is known to be the same run
        if (folder / "base").exists():  # of a start that failed, perhaps with another seed
            durable.remove(folder / "base")
        runfolder.write_config(folder / "config.yaml", config)
        (folder / "quarantine.csv").unlink(missing_ok=True)
    with display.logging_to(folder), signals.ending_at_once():
        try:
            result = run.train(config, folder)
            if config.preflight == "only" and not config.resume:  # or the run that was looked at loses its own result
                runfolder.write_json(folder / "result.json", result)
            return result
        except BaseException as error:
            if isinstance(error, BadRowsError):
                write_quarantine(folder / "quarantine.csv", error.bad)
            if not config.resume or not (folder / "result.json").exists():
                with suppress(OSError):  # on a full disk the error itself matters more
                    runfolder.write_failure(folder, error)
            raise


def check_free(folder: Path, config: Config) -> None:
    """Raise ConfigError where a running process uses the folder, or where it holds a run that this one does not resume.

    A run that failed or was killed before it saved anything is no obstacle.
    """
    from vlmtune import durable, lock
    from vlmtune.runfolder import read_result

    lock.check(Path(config.resume).expanduser() if config.resume else folder)
    if config.resume or not (folder / "config.yaml").exists():
        return
    killed = "killed" if (folder / lock.NAME).exists() else None  # a run of ours that nothing runs any more
    status = (read_result(folder) or {"status": killed})["status"]
    saved = [*durable.names(folder / "checkpoints"), *({"model"} & {*durable.names(folder)})]
    if saved or status not in ("failed", "preflight", "killed"):
        raise ConfigError(
            f"{folder}: holds a run already; choose another hydra.run.dir, or go on with it: resume={folder}"
        )


def load(folder: str | Path, *, overrides: Sequence[str] = ()) -> Predictor:
    """Open a finished run (its folder, or the `model/` in it) to answer questions.

    `overrides`: keys of the run's config to change, for instance `["generation.max_new_tokens=32"]`.
    Raises CheckpointError: no run there; ModelError: its base model can't be opened.
    """
    from vlmtune.compose import normalise, saved_config
    from vlmtune.strict import strict

    path = Path(folder).expanduser()
    path = path.parent if path.name == "model" and (path.parent / "config.yaml").exists() else path
    usable, problems = normalise(overrides)
    if problems:
        raise ConfigError(problems)
    return Predictor(path, strict(saved_config(path, usable)))


class Predictor:
    """A fine-tuned model with everything that its answers depend on."""

    def __init__(self, folder: Path, config: Config):
        from vlmtune import session
        from vlmtune.data.encode import Encoder
        from vlmtune.models import load

        self.config = config
        self.engine = session.engine(config)
        dtypes = session.dtypes(config, self.engine)
        self.model, processor = load.load_trained(folder, config, device=self.engine.device, **dtypes)
        self.encoder = Encoder(
            processor,
            system_prompt=config.model.system_prompt,
            max_image_pixels=config.data.max_image_pixels,
            supervise=config.data.supervise,
            fast_jpeg=config.data.fast_jpeg,
        )

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A copy of `frame` with the column `answer_predictions`, in row order.

        `frame` has the run's image and question columns; an image is a path, bytes or a PIL image. A row that can't be
        used gets no answer (NA) and its reason in a column `error`; the others are answered.
        """
        return self._predict(frame)[0]

    def _predict(self, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[BadRow]]:
        """The answered frame, and the rows that could not be used."""
        from vlmtune.data.table import audit_frame

        file = str(frame.attrs.get("file", ""))  # relative paths start at the folder of a table that was read from one
        data = dataclasses.replace(self.config.data, check_images="decode")  # one bad image must not end the others
        split = audit_frame(frame, data, self.config.task, file=file, answers_required=False)
        try:
            answers = self.answer(split.records)
        except DataError:
            self._set_apart(split)
            answers = self.answer(split.records)
        out = frame.copy()
        column: list[str | None] = [None] * len(frame)
        for record, answer in zip(split.records, answers, strict=True):
            column[record.row] = answer
        out["answer_predictions"] = column
        if split.bad:
            reasons = {bad.row - 1: bad.reason for bad in split.bad}
            out["error"] = [reasons.get(row) for row in range(len(frame))]
        return out, split.bad

    def _set_apart(self, split: Split) -> None:
        """Move records that the model's family refuses (an image too thin, say) to the split's bad rows."""
        kept = []
        for record in split.records:
            try:
                self.encoder.encode([record], answered=False)
                kept.append(record)
            except DataError as error:
                split.bad.append(BadRow(record.file, 0, record.row + 1, "; ".join(error.problems)))
        split.records = kept

    def answer(self, records: Sequence[Any]) -> list[str]:
        """One answer per record, in order."""
        from vlmtune import display
        from vlmtune.generate import generate

        size = self.config.trainer.eval_batch_size
        with display.bar("predicting", len(records)) as advance:
            return generate(
                self.model,
                self.encoder,
                records,
                self.config.generation,
                batch_size=size,
                autocast=self.engine.autocast,
                share=self.shares_answers(records),
                advance=advance,
            )

    def shares_answers(self, records: Sequence[Any]) -> bool:
        """Whether neighbouring rows that show the same image are answered with the image once: where a few of them get
        the answers that they get one by one.
        """
        from vlmtune.data.batches import groups_of, repeated
        from vlmtune.preflight import answers_agree

        probe = repeated(records, groups_of(records), most=6)
        return answers_agree(self.model, self.encoder, probe, self.engine)


def predict_file(folder: str, config: Config, output: str) -> int:
    """Answer the rows of `data.test` into the CSV file `output`; returns how many rows failed.

    Raises DataError where the file can't be read or no row can be used.
    """
    from vlmtune import display
    from vlmtune.data.table import load as load_table
    from vlmtune.data.table import read_files
    from vlmtune.runfolder import write_table

    if config.data.test is None:
        raise ConfigError("data.test: missing; give the CSV file to answer, for instance data.test=test.csv")
    target = output_file(output)
    with display.logging_to(None):
        data = of_test_rows(config.data)
        if data._target_ == READ_FILES:
            frame = read_files(data)["test"]
            answered, bad = Predictor(Path(folder), config)._predict(frame)
        else:  # audited by itself: what can't be used is told by its policy
            split = load_table(data, config.task, config.trainer.seed, ("test",), answers_required=False)["test"]
            records: Any = split.records
            frame, bad = records.frame(), []
            answered = frame.assign(answer_predictions=Predictor(Path(folder), config).answer(records))
    if bad and len(bad) == len(frame):
        raise DataError(f"{config.data.test}: no row can be used; the first: {bad[0].reason}")
    write_table(target, answered)
    return len(bad)


READ_FILES = "vlmtune.data.table.read_files"


def of_test_rows(data: DataConfig) -> DataConfig:
    """The config for reading `data.test` alone: a file, or a data set of a hub where the run trained on such."""
    from vlmtune.data.files import READERS

    own = dataclasses.replace(data, train=None, validation=None, validation_fraction=0.0)
    is_file = Path(str(data.test)).suffix.lower() in READERS
    hub = data._target_ == "vlmtune.data.hub.load" and not is_file
    return own if hub else dataclasses.replace(own, _target_=READ_FILES)


def output_file(output: str) -> Path:
    """The file to write to. Raises ConfigError where its folder does not exist, before any time is spent."""
    target = Path(output).expanduser()
    if not target.parent.is_dir():
        raise ConfigError(f"output={output}: the folder {target.parent} does not exist")
    return target


def evaluate_run(folder: str, config: Config, output: str | None) -> str:
    """Score a finished run on `data.test`, or on its validation rows without one; returns the scores as a table.

    `output`: a CSV file for the rows with answer_predictions and score. Raises DataError for rows that can't be used.
    """
    from vlmtune import display
    from vlmtune.data import table
    from vlmtune.evaluation import evaluate
    from vlmtune.runfolder import write_predictions

    target = output_file(output) if output is not None else None
    split = "validation" if config.data.test is None else "test"
    if split == "test":
        config.data = of_test_rows(config.data)
    with display.logging_to(None):
        rows = table.load(config.data, config.task, config.trainer.seed, (split,))[split]
        predictor = Predictor(Path(folder), config)
        found = evaluate(
            predictor.model,
            predictor.encoder,
            rows.records,
            config,
            predictor.engine,
            title="evaluating",
            share_answers=predictor.shares_answers(rows.records),
        )
    if target is not None:
        write_predictions(target, rows, found, config.task.metrics[0])
    title = f"{len(rows)} {split} rows" + (f", {len(rows.bad)} more left out" if rows.bad else "")
    return display.table(title, ("metric", "value"), [(name, f"{value:.4f}") for name, value in found.metrics.items()])


__all__ = ["Predictor", "evaluate_run", "load", "predict_file", "run_in", "train"]
