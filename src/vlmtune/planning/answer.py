"""The answer of `plan.py`: from a config to what a person reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlmtune.config.schema import Config, ModelConfig
from vlmtune.data.splits import Records
from vlmtune.errors import ConfigError
from vlmtune.planning import words
from vlmtune.planning.advice import fits
from vlmtune.planning.architecture import architecture_of, local_folder
from vlmtune.planning.estimate import Plan
from vlmtune.planning.lengths import Lengths, estimated, row_of
from vlmtune.planning.rows import Batches, Row, assumed, of_records, shape_of


def answer(config: Config, row: Row, overrides: Sequence[str], *, reads_data: bool) -> str:
    """The memory of a run, the cards that it fits, and the command that fits the smallest.

    `row`: assumed where the data are not read. Raises ConfigError and what reading data raises.
    """
    processor = _processor(config.model)
    architecture = architecture_of(config.model, processor)
    records = _records(config) if reads_data else None
    lengths, batches_of = _rows(config, architecture, processor, records, row)
    plan = Plan(architecture, batches_of)
    processes = count(config)
    estimate = plan.of(config, processes=processes)
    found = fits(plan, config, processes)
    rows, longest = config.trainer.batch_size, batches_of(config)(1).padded_tokens
    what = f"{rows} row{'s' * (rows > 1)} of {longest} tokens"
    said = [f"{config.model.name}, {_setting(config)}", f"  {lengths}", "", words.table(estimate, what, processes), ""]
    said.append(words.cards(found))
    if (command := words.command(found, overrides)) is not None:
        said += ["", command]
    return "\n".join(said)


def count(config: Config) -> int:
    """The processes of a run; one where the config leaves them to the machine."""
    backend = config.backend
    if backend.name == "ray":
        workers = backend.num_workers
        return int(workers[0] if isinstance(workers, list) else workers or 1)
    return int(backend.num_processes or 1) if backend.name == "accelerate" else 1


def _setting(config: Config) -> str:
    adapter = f"adapter {config.adapter.method}" if config.uses_adapter else "all weights"
    quantized = f", {config.quantization.method}" if config.is_quantized else ""
    recomputed = ", activations recomputed" if config.trainer.gradient_checkpointing else ""
    return f"{adapter}{quantized}, {config.optimizer.name}{recomputed}"


def _processor(model: ModelConfig) -> Any:
    """The processor of a local folder; None for a model of the hub."""
    if model.fresh:
        raise ConfigError(f"model.fresh={model.fresh}: a model that is not written yet can't be planned for")
    if local_folder(model) is None:
        return None
    from vlmtune.models.explain import explained
    from vlmtune.prompt.processors import load_processor

    with explained(model):
        return load_processor(model)


def _records(config: Config) -> Records:
    """The training rows. Raises DataError as a run does."""
    from vlmtune.data import table

    data = dataclasses.replace(config.data, check_images="header")
    records = table.load(data, config.task, config.trainer.seed, ("train",))["train"].records
    if records.streamed:
        raise ConfigError("data.streaming: the rows of a stream are not known in advance; leave the data out")
    return records


def _rows(
    config: Config, architecture: Any, processor: Any, records: Records | None, row: Row
) -> tuple[Lengths | str, Any]:
    """What is known of the rows, and a function from a config to its batches."""
    if records is not None and processor is not None:
        return _of_processor(config, processor, records)
    found: Lengths | str
    if records is not None:
        found = known = estimated(records, config, architecture)
        longest = row_of(known, records)
    else:
        image = row.image or shape_of(architecture).tokens(config.model.image.max_tokens)
        longest = Row(image, row.text, row.answer)
        found = f"assumed: an image of {image} tokens and {row.text} of text, of which {row.answer} are the answer"

    def batches_of(changed: Config) -> Batches:
        most = changed.model.image.max_tokens
        return assumed(
            architecture, dataclasses.replace(longest, image=min(longest.image or 0, most or longest.image or 0))
        )

    return found, batches_of


def _of_processor(config: Config, processor: Any, records: Records) -> tuple[Lengths, Any]:
    """Real rows, measured and encoded by the model's own processor."""
    from vlmtune.prompt.encode import Encoder
    from vlmtune.prompt.processors import load_processor

    lengths = Lengths(Encoder.of(processor, config).lengths(records), measured=True)
    longest = [records[lengths.longest]]

    def batches_of(changed: Config) -> Batches:
        own = processor if changed.model.image == config.model.image else load_processor(changed.model)
        return of_records(Encoder.of(own, changed), longest)

    return lengths, batches_of
