"""The files of a run folder, each written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmtune import display
from vlmtune.config.schema import Config, plain
from vlmtune.data.splits import Split
from vlmtune.errors import CheckpointError, failure_of, naming
from vlmtune.launch import signals
from vlmtune.metrics import lower_is_better
from vlmtune.record import environment
from vlmtune.record.metrics_file import read_metrics
from vlmtune.record.outputs import ANSWER, as_cells, score_columns

if TYPE_CHECKING:  # they import torch, and a run that fails at once should not wait for it
    from vlmtune.evaluation.evaluate import Evaluation
    from vlmtune.record.progress import Progress

log = logging.getLogger("vlmtune")
FILES = {"model": "model", "predictions": "predictions.csv", "curves": "report.html", "numbers": "result.json"}


def make_result(
    status: str, progress: Progress, metrics: dict[str, float], objective: str, memory: dict[str, int]
) -> dict[str, Any]:
    """What result.json holds. `objective`: the metric that a sweep compares. `memory`: as `environment.memory`, over
    all processes.
    """
    seconds = max(progress.seconds, 1e-9)
    return {
        "status": status,
        "objective": metrics.get(f"eval/{objective}"),
        "objective_is": "minimized" if lower_is_better(objective) else "maximized",
        "steps": progress.step,
        "examples": progress.examples,
        "skipped_steps": progress.skipped,
        "metrics": metrics,
        "speed": {
            "examples_per_second": progress.examples / seconds,
            "tokens_per_second": progress.tokens / seconds,
            "training_seconds": seconds,
        },
        "memory": memory,
        "error": None,
    }


def read_result(folder: Path) -> dict[str, Any] | None:
    """What result.json holds, None where the run has none yet. Raises CheckpointError where it can't be read."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not isinstance(result.get("status"), str):
            raise ValueError("it has no status")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}; delete it or put the right one back") from error
    return result


def closing_table(folder: Path, result: dict[str, Any]) -> str:
    """Scores before and after, time, memory, and where everything is."""
    metrics, speed, memory = result["metrics"], result["speed"], result["memory"]
    names = [name.removeprefix("eval/") for name in metrics if name.startswith("eval/")]

    def cell(key: str) -> str:
        return f"{metrics[key]:.4f}" if key in metrics else "-"

    rows = [(name, cell(f"baseline/{name}"), cell(f"eval/{name}")) for name in names]
    lines = [display.table("Result", ("metric", "before", "after"), rows)] if rows else []
    used = environment.peak_bytes(memory) or 0
    lines.append(
        f"{result['status']}: {result['steps']} steps, {result['examples']} examples in "
        f"{display.duration(speed['training_seconds'])} ({speed['examples_per_second']:.0f} examples/s), "
        f"peak memory {display.size(used, 'B')}"
    )
    if (found := environment.prediction(memory)) is not None:
        predicted, seen = found
        over = "" if memory.get("peak_device_bytes") else " beside what the process held before"
        lines.append(f"memory: {display.size(predicted, 'B')} predicted, {display.size(seen, 'B')} seen{over}")
    lines += [f"  {name:<12} {folder / file}" for name, file in FILES.items() if (folder / file).exists()]
    return "\n".join(lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power failure may leave the name without the content
    partial.replace(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, in which NaN and infinities are null."""
    write_whole(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_config(path: Path, config: Config) -> None:
    """Write the resolved config as YAML that `resume=` and `predict.py` read back."""
    write_whole(path, yaml.safe_dump(plain(absolute(config)), sort_keys=False, allow_unicode=True))


def absolute(config: Config) -> Config:
    """The config with absolute paths, which mean the same from every working directory."""
    known = {name: _each(_absolute, getattr(config.data, name)) for name in ("train", "validation", "test")}
    known |= {name: _each(_absolute_folder, getattr(config.data, name)) for name in ("image_root", "cache_folder")}
    path = config.model.path
    local = str(Path(path).absolute()) if path is not None and Path(path).is_dir() else path
    return replace(config, data=replace(config.data, **known), model=replace(config.model, path=local))


def _absolute_folder(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _each(change: Callable[[str], str], value: Any) -> Any:
    """A key's value with its path changed, or each of a list or a mapping of paths."""
    if isinstance(value, dict):
        return {name: change(path) for name, path in value.items()}
    return [change(path) for path in value] if isinstance(value, list) else value and change(value)


def _absolute(path: str) -> str:
    """An absolute path; `FILE:KEY` and `FOLDER:SPLIT` keep their ends, and the id of a hub stays as it is."""
    from vlmtune.data.sources.files import is_table, parted

    place, colon, split = path.partition(":")
    if is_table(path) or Path(path).expanduser().exists():
        file, key = parted(path)
        return str(file.absolute()) + (f":{key}" if key is not None else "")
    return f"{Path(place).expanduser().absolute()}{colon}{split}" if Path(place).expanduser().is_dir() else path


def write_predictions(path: Path, split: Split, found: Evaluation, metrics: Sequence[str]) -> None:
    """Write the split's own columns, answer_predictions and the scores, in row order: `score` is that of the first of
    `metrics`, `score_NAME` that of another.

    A column of the input that has one of these names is kept as NAME_before.
    """
    frame, columns = frame_of(split), dict(zip(score_columns(metrics), metrics, strict=True))
    for name in (ANSWER, *columns):
        if name in frame.columns:
            log.warning("%s: the input's column %s is kept as %s_before", path, name, name)
    frame = frame.rename(columns={name: f"{name}_before" for name in (ANSWER, *columns)})
    frame[ANSWER] = found.predictions
    for column, metric in columns.items():
        frame[column] = [scores[metric] for scores in found.scores]
    write_table(path, frame)


def frame_of(split: Split) -> Any:
    """A frame of the split's usable rows: their own columns where they came from a table."""
    import pandas as pd

    if (own := split.records.frame()) is not None:
        return own
    if split.frame is not None:
        return split.frame.iloc[[record.row for record in split.records]].copy()
    rows = [(record.group, record.question, next(iter(record.answers), None)) for record in split.records]
    return pd.DataFrame(rows, columns=["image_path", "question", "answer"])


def write_table(path: Path, frame: Any) -> None:
    """Write a frame as CSV, lists and objects in its cells as JSON."""
    write_whole(path, as_cells(frame).to_csv(index=False))


def write_failure(folder: Path, error: BaseException, memory: dict[str, int] | None = None) -> None:
    """Say in result.json that and why the run failed or was interrupted, with what its log shows of how far it came.

    `memory`: as `environment.memory`, which it is by default; where this process is not the run's own, another.
    """
    stopped = isinstance(error, signals.Interrupted | KeyboardInterrupt)
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    result: dict[str, Any] = {
        "status": "interrupted" if stopped else "failed",
        "objective": None,
        "steps": last.get("step", 0),
        "examples": last.get("train/examples", 0),
        "metrics": {name: value for name, value in last.items() if name.startswith(("eval/", "test/"))},
        "speed": {},
        "memory": environment.memory() if memory is None else memory,
        "error": {"type": type(error).__name__, "failure": failure_of(error), "message": str(error)},
    }
    if stopped:
        result["signal"] = getattr(error, "number", signal.SIGINT)
    write_json(folder / "result.json", result)
