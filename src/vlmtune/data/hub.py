"""Data sets of Hugging Face's `datasets`: a folder that it wrote or reads, or an id of a hub.

Rows stay on disk, memory-mapped, and are read when a step takes them, so a set may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vlmtune.config import DataConfig, TaskConfig
from vlmtune.data.audit import Reader, column_problems, keys_of
from vlmtune.data.images import image_size, open_image
from vlmtune.data.records import BadRow, Record, Split
from vlmtune.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")


def load(config: DataConfig) -> dict[str, HubTable]:
    """Open what `data.train`, `data.validation` and `data.test` name: PATH_OR_ID, or PATH_OR_ID:SPLIT.

    The split's name is otherwise the key's own. Raises DataError: no such set, split or network.
    """
    named = {split: getattr(config, split) for split in SPLITS if getattr(config, split) is not None}
    return {split: HubTable(_open(path, split, config.subset), path) for split, path in named.items()}


def _open(path: str, split: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("data=hub needs the package datasets: pip install 'vlmtune[datasets]'") from None
    datasets.disable_progress_bars()
    place, _, name = path.partition(":")
    wanted = name or split
    folder = Path(place).expanduser()
    try:
        if (folder / "state.json").exists():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(folder))
            if wanted not in found:
                raise DataError(f"data.{split}={path}: has no split {wanted!r}; {nearest(wanted, found)}")
            return found[wanted]
        return datasets.load_dataset(str(folder) if folder.is_dir() else place, name=subset, split=wanted)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"data.{split}={path}: can't be opened: {reason}") from error


class HubTable:
    """One split, before it is audited."""

    def __init__(self, dataset: Any, name: str):
        import datasets

        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))  # decoded, bounded, by us
        self.dataset, self.name = dataset, name

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool) -> Split:
        """Read every row once, its images as `data.check_images` says; keep the good ones for reading again."""
        from vlmtune import display

        if problems := column_problems(self.dataset.column_names, config.columns, self.name, answers_required):
            raise DataError(problems)
        reader = Reader(config, task, self.name, answers_required)
        check = open_image if config.check_images == "decode" else image_size
        faults: dict[Hashable, list[str]] = {}
        digest, good, groups = hashlib.sha256(), [], []
        split = Split([], None)
        with display.bar(f"checking {self.name}", len(self.dataset)) as advance:
            for row, cells in enumerate(self.dataset):
                record, found = reader.read_cells(row, cells)
                for key, source in zip(keys_of(record), record.images, strict=True):
                    if key not in faults:
                        try:
                            check(source, config.max_image_pixels)
                            faults[key] = []
                        except DataError as error:
                            faults[key] = error.problems
                    found += faults[key]
                if found:
                    split.bad.append(BadRow(self.name, 0, row + 1, "; ".join(found)))
                else:
                    good.append(row)
                    groups.append(record.group)
                    digest.update(repr((record.group, record.turns, record.system)).encode())
                advance(1)
        split.records = HubRows(self.dataset, reader, good, groups, digest.hexdigest())
        return split


class HubRows(Sequence[Record]):
    """The usable rows of a split, read from disk when asked for."""

    def __init__(self, dataset: Any, reader: Reader, rows: list[int], groups: list[Hashable], fingerprint: str):
        self.dataset, self.reader, self.rows = dataset, reader, rows
        self.groups, self.fingerprint = groups, fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> HubRows: ...
    def __getitem__(self, index: int | slice) -> Record | HubRows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        row = self.rows[index]
        return self.reader.read_cells(row, self.dataset[row])[0]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> HubRows:
        """These rows of the same set."""
        rows, groups = [self.rows[i] for i in indices], [self.groups[i] for i in indices]
        return HubRows(self.dataset, self.reader, rows, groups, f"{self.fingerprint} {rows[:1]}+{len(rows)}")

    def frame(self) -> pd.DataFrame:
        """The rows' columns without images, for predictions.csv."""
        import pandas as pd

        image = self.reader.names["image"]
        kept = [name for name in self.dataset.column_names if name != image]
        return pd.DataFrame(self.dataset.select(self.rows).select_columns(kept).to_list())
