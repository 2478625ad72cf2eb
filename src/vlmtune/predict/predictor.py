"""A fine-tuned model that answers rows: a bad row gets an error message, the others are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config.schema import Config
from vlmtune.data.splits import Records, Split
from vlmtune.errors import DataError
from vlmtune.memory import TRAINING, is_out_of_memory, memory_advice
from vlmtune.record.outputs import ANSWER, ERROR, Answers, refuse_columns

if TYPE_CHECKING:
    import pandas as pd

    from vlmtune.prompt.encode import Encoder


class Predictor:
    """A fine-tuned model and everything that its answers depend on."""

    def __init__(self, folder: Path, config: Config):
        from vlmtune.launch import surroundings

        self.config = config
        with surroundings.kept(), memory_advice(self.config.saves_memory.union(TRAINING)):
            self._open(folder)
            self.random_state = surroundings.random_state()

    def _open(self, folder: Path) -> None:
        from vlmtune.launch import session
        from vlmtune.models import load, merging
        from vlmtune.prompt.encode import Encoder

        config = self.config
        self.engine = session.engine(config, trains=False)
        dtypes = answering(session.dtypes(config, self.engine), config)
        model, processor = load.load_trained(folder, config, device=self.engine.device, **dtypes)
        self.model = merging.merged(model, config)
        self.encoder = Encoder.of(processor, config)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside the context, this predictor's random state is active; the caller's is restored afterwards."""
        from vlmtune.launch import session, surroundings

        with surroundings.kept(), memory_advice(self.config.saves_memory.union(TRAINING)):
            session.quiet_libraries()
            surroundings.set_random_state(self.random_state)
            try:
                yield
            finally:
                self.random_state = surroundings.random_state()

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A copy of `frame` with the column `answer_predictions`, in row order.

        `frame` has the run's image and question columns; an image is a path, bytes or a PIL image. Relative paths start
        at `data.image_root` if `load(..., overrides=["data.image_root=FOLDER"])` sets it, else at the folder of the
        file that vlmtune read the frame from, or at the working directory for any other frame.

        A row that can't be used gets no answer (NA) and its reason in the column `error`; the others are answered.
        """
        place = str(frame.attrs.get("file", "the frame"))
        refuse_columns(frame.columns, (ANSWER, ERROR), place)
        split = audited(frame, self.config)
        answers = Answers(frame, reasons_of(split))
        self.fill(answers, split.records, [record.row for record in split.records])
        return answers.table()

    def fill(
        self,
        answers: Answers,
        records: Records,
        rows: Sequence[int],
        done: Callable[[int], None] = lambda stop: None,
    ) -> None:
        """Answer `records`, which are the rows `rows` of the frame; a record that fails gets its reason.

        After each batch `done` is called with the row number before which all rows are answered.
        """
        from vlmtune import display
        from vlmtune.evaluation.prepared import Prepared, dealt

        batches = dealt(len(records), self.config.trainer.eval_batch_size)
        with self.at_work(), display.bar("predicting", len(records)) as advance:
            try:
                share = self.shares_answers(records)
            except (DataError, RuntimeError, MemoryError) as error:
                reason_of(error)
                share = False
            prepared = Prepared(self.encoder, records, batches, self.config.trainer, self.engine)
            for numbers, batch in prepared:
                self._fill_batch(answers, prepared.encoder, batch, [rows[number] for number in numbers], share)
                done(rows[numbers[-1]] + 1)
                advance(len(batch))
                prepared.let_go()

    def _fill_batch(
        self, answers: Answers, encoder: Encoder, records: Sequence[Any], rows: Sequence[int], share: bool
    ) -> None:
        """Answer some records together; if that fails, one by one."""
        try:
            found = self._answer(encoder, records, share)
        except (DataError, RuntimeError, MemoryError) as error:
            reason = reason_of(error)
            if len(records) == 1:
                answers.reasons[rows[0]] = reason
            else:
                for record, row in zip(records, rows, strict=True):
                    self._fill_batch(answers, encoder, [record], [row], False)
        else:
            answers.texts |= dict(zip(rows, found, strict=True))

    def _answer(self, encoder: Encoder, records: Sequence[Any], share: bool) -> list[str]:
        """One answer per record, in order. `share`: neighbouring records that show the same image share it."""
        from vlmtune.evaluation.generate import generate

        return generate(
            self.model,
            encoder,
            records,
            self.config.generation,
            batch_size=self.config.trainer.eval_batch_size,
            autocast=self.engine.autocast,
            share=share,
        )

    def shares_answers(self, records: Records) -> bool:
        """Whether neighbouring rows that show the same image may share it: if a few of them get the same answers as one
        by one.
        """
        from vlmtune.batching.groups import groups_of
        from vlmtune.proof.pairs import pairs
        from vlmtune.proof.probes import answers_agree

        found = pairs(self.encoder, records, groups_of(records, self.encoder), most=6)
        return bool(found) and all(answers_agree(self.model, self.encoder, rows, self.engine) for rows in found)


def answering(dtypes: dict[str, Any], config: Config) -> dict[str, Any]:
    """The data types to answer in: with `model.dtype=auto` all weights in bfloat16 if that is computed in, those too
    that trained in float32. float16's range may not hold the activations that float32 weights give.
    """
    import torch

    lower = config.model.dtype == "auto" and dtypes["compute_dtype"] == torch.bfloat16
    return {**dtypes, "dtype": torch.bfloat16} if lower else dtypes


def reason_of(error: Exception) -> str:
    """Why one row can't be answered. Raises errors that concern all rows."""
    if isinstance(error, DataError):
        return "; ".join(error.problems)
    if is_out_of_memory(error):
        return "out of memory for this row; lower trainer.eval_batch_size or model.image.max_tokens"
    raise error


def audited(frame: pd.DataFrame, config: Config) -> Split:
    """The frame's rows to answer, with each image decoded once, so that a bad image does not stop the others."""
    from vlmtune.data.audit import audit_frame
    from vlmtune.data.table import image_root_of

    file = str(frame.attrs.get("file", ""))  # relative paths start at the folder of the frame's file
    data = dataclasses.replace(config.data, image_root=image_root_of(config.data, "test"), check_images="decode")
    return audit_frame(frame, data, config.task, file=file, answers_required=False)


def reasons_of(split: Split) -> dict[int, str]:
    """For each bad row its position in the frame, and its reason with its line in the file."""
    return {bad.index: f"line {bad.line}: " * (bad.line > 0) + bad.reason for bad in split.bad}
