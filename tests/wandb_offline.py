"""Read back what W&B wrote offline: its log is LevelDB's format around protobuf messages.

Format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after a file header of 7 bytes.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER = 7
BLOCK = 32768
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def read(folder: Path) -> dict[str, Any]:
    """Read the one offline run below `folder`, for instance a run folder.

    id: of the run; history: one dict per `log` call, media entries as `samples/path` and the like; config, summary:
    dicts by top-level name; files: paths in the run's `files` folder; images: path in the sample table's artifact ->
    where the picture lies until it is uploaded; metrics: `define_metric` calls as (name or glob, x axis); exit_code.
    """
    (log,) = folder.rglob("run-*.wandb")
    _wait_until_finished(log)
    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "files": [], "images": {}, "metrics": []}
    for record in records(log):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"] = record.run.run_id
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found["history"].append(_values(record.history.item))
        elif kind == "summary":
            found["summary"] |= _values(record.summary.update)
        elif kind == "files":
            found["files"] += [item.path for item in record.files.files]
        elif kind == "artifact":
            entries = [entry for entry in record.artifact.manifest.contents if "media/images" in entry.path]
            found["images"] |= {entry.path: Path(entry.local_path) for entry in entries}
        elif kind == "metric":
            found["metrics"].append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


def places(folder: Path) -> list[tuple[str, str]]:
    """The group and the job type of each run below a folder. W&B may have written nothing yet of one that is killed."""
    found = [each.run for log in folder.rglob("run-*.wandb") for each in records(log) if each.HasField("run")]
    return [(run.run_group, run.job_type) for run in found]


def _wait_until_finished(log: Path, seconds: float = 10) -> None:
    """`finish` of an offline run returns before W&B's service has written its last block (wandb 0.31)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(record.WhichOneof("record_type") != "exit" for record in records(log)):
        time.sleep(0.05)


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(log: Path) -> Iterator[Any]:
    """Join the chunks of each message; a message may span blocks of 32 KiB."""
    data, position, message = log.read_bytes(), FILE_HEADER, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        start = position + CHUNK_HEADER.size
        chunk, position = data[start : start + length], start + length
        message = chunk if kind in (FULL, FIRST) else message + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(message)
            yield record
