"""Rows of a data set that stay on disk and are read when a step needs them: a set may be larger than memory."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.audit import keys_of
from vlmtune.data.columns import SAMPLE, column_problems, columns_with_text, log_unread
from vlmtune.data.images import image_size, open_image
from vlmtune.data.reader import RowReader
from vlmtune.data.records import BadRow, Record
from vlmtune.data.sources.arrow import of_feature
from vlmtune.data.splits import RecordList, Records, Split
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def undecoded(dataset: Any) -> Any:
    """The data set with undecoded images: we decode them, with a size limit."""
    import datasets

    def stored(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(stored(feature.feature), length=feature.length)
        return {name: stored(inner) for name, inner in feature.items()} if isinstance(feature, dict) else feature

    dataset = dataset.with_format(None)  # a saved set keeps the format (tensors, columns) in which it was last read
    if dataset.features is None:  # a stream that has not been read yet
        dataset = dataset._resolve_features()
    for column, feature in dataset.features.items():
        if (changed := stored(feature)) != feature:
            dataset = dataset.cast_column(column, changed)
    return dataset


def _of_images(feature: Any) -> bool:
    """Whether a column contains images, or lists of images."""
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


class HubReader(RowReader):
    """Reads rows of a data set, with values converted by the set's features, for instance class names."""

    def __init__(self, dataset: Any, config: DataConfig, task: TaskConfig, name: str, answers_required: bool):
        columns = list(dataset.features)
        texts = columns_with_text(_first_cells(dataset))
        if problems := column_problems(columns, config.columns, name, answers_required, task, texts):
            raise DataError(problems)
        super().__init__(config, task, name, answers_required, columns)
        log_unread(name, columns, config, self.refusable)
        converters = {column: of_feature(feature) for column, feature in dataset.features.items()}
        self.converters = {column: convert for column, convert in converters.items() if convert}

    def read_cells(self, row: int, cells: Mapping[str, Any]) -> tuple[Record, list[str]]:
        return super().read_cells(row, self.converted(cells))

    def converted(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its values as in the source."""
        return {name: self.converters[name](cell) if name in self.converters else cell for name, cell in cells.items()}


def _first_cells(dataset: Any) -> dict[str, list[Any]]:
    """The first cells of each column, of a stream or a data set."""
    rows = list(dataset.take(SAMPLE if hasattr(dataset, "__len__") else 1))
    return {name: [row[name] for row in rows] for name in dataset.features}


class CheckedReader:
    """Reads rows and checks each distinct image once, by `data.check_images`."""

    def __init__(self, reader: RowReader, config: DataConfig):
        self.reader, self.most = reader, config.max_image_pixels
        self.look = open_image if config.check_images == "decode" else image_size
        self.faults: dict[Hashable, list[str]] = {}

    def __call__(self, row: int, cells: dict[str, Any]) -> tuple[Record, list[str]]:
        record, found = self.reader.read_cells(row, cells)
        for key, source in zip(keys_of(record), record.images, strict=True):
            if key not in self.faults:
                try:
                    self.look(source, self.most)
                    self.faults[key] = []
                except DataError as error:
                    self.faults[key] = error.problems
            found += self.faults[key]
        return record, found


class HubTable:
    """One split, before it is audited."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = undecoded(dataset), name

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int = 0) -> Split:
        """Read every row once and check its images by `data.check_images`; keep the numbers of the good rows."""
        from vlmtune import display

        reader = HubReader(self.dataset, config, task, self.name, answers_required)
        check = CheckedReader(reader, config)
        first: dict[Hashable, int] = {}
        digest = hashlib.sha256()
        good: list[int] = []
        groups: list[Hashable] = []
        split = Split(RecordList([]))
        with display.bar(f"checking {self.name}", len(self.dataset)) as advance:
            for row, cells in enumerate(self.dataset):
                record, found = check(row, cells)
                content = hashlib.sha256(repr((record.group, record.turns, record.system)).encode()).digest()
                if found:
                    split.bad.append(BadRow(self.name, 0, row + 1, "; ".join(found)))
                else:
                    if answers_required and (original := first.setdefault(content, len(good))) != len(good):
                        split.repeats.append((len(good), original))
                    good.append(row)
                    groups.append(record.group)
                    digest.update(content)
                advance(1)
        reader.log()
        split.records = HubRows(self.dataset, reader, good, groups, digest.hexdigest())
        reader.warn_of_no_images(split.records, self.dataset.column_names)
        return split


class HubRows(Records):
    """The usable rows of a split, read from disk on demand."""

    on_demand = True

    def __init__(self, dataset: Any, reader: HubReader, rows: list[int], groups: list[Hashable], fingerprint: str):
        self.dataset, self.reader, self.rows = dataset, reader, rows
        self._groups, self._fingerprint = groups, fingerprint

    def groups(self) -> list[Hashable]:
        return self._groups

    def fingerprint(self) -> str:
        """A hash of the rows' content at the time of the audit, including images."""
        return self._fingerprint

    def image_fingerprint(self) -> None:
        return None

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
        """A subset of the rows of the same data set."""
        rows, groups = [self.rows[i] for i in indices], [self._groups[i] for i in indices]
        return HubRows(self.dataset, self.reader, rows, groups, f"{self._fingerprint} {rows[:1]}+{len(rows)}")

    def frame(self) -> pd.DataFrame:
        """The columns of the rows, except images, for predictions.csv."""
        import pandas as pd

        image = self.reader.names["image"]
        kept = [name for name, feature in self.dataset.features.items() if name != image and not _of_images(feature)]
        rows = self.dataset.select(self.rows).select_columns(kept)
        return pd.DataFrame([self.reader.converted(row) for row in rows], dtype=object)
