"""Data sets of Hugging Face's `datasets`: a folder that it wrote or reads, or an id of a hub.

Rows stay on disk, memory-mapped, and are read when a step takes them, so a set may be larger than memory.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.audit import Reader, keys_of
from vlmtune.data.columns import SAMPLE, column_problems, columns_with_text, tell_unread
from vlmtune.data.images import image_size, open_image
from vlmtune.data.records import BadRow, Record
from vlmtune.data.sources.arrow import of_feature
from vlmtune.data.splits import RecordList, Records, Split
from vlmtune.errors import DataError, nearest
from vlmtune.network import unreachable

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")
log = logging.getLogger("vlmtune")


def load(config: DataConfig) -> dict[str, HubTable | HubStream]:
    """Open what `data.train`, `data.validation` and `data.test` name: PATH_OR_ID, or PATH_OR_ID:SPLIT.

    The split's name is otherwise the key's own. Raises DataError: no such set, split or network.
    """
    named = {split: getattr(config, split) for split in SPLITS if getattr(config, split) is not None}
    if several := [f"data.{split}" for split, path in named.items() if not isinstance(path, str)]:
        raise DataError(f"{', '.join(several)}: data=hub reads one data set; lists of files are for data=csv")
    if config.streaming:
        opened = {split: _open(path, split, config.subset, streaming=True) for split, path in named.items()}
        return {split: HubStream(opened[split], path, split) for split, path in named.items()}
    return {split: HubTable(_open(path, split, config.subset), path) for split, path in named.items()}


def _open(path: str, split: str, subset: str | None, *, streaming: bool = False) -> Any:
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
            found = datasets.load_from_disk(str(folder))
            if name and name != str(found.split):
                raise DataError(f"data.{split}={path}: is a single split, so it has no {name!r}")
            return found.to_iterable_dataset() if streaming else found
        if (folder / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(folder))
            if wanted not in found:
                raise DataError(f"data.{split}={path}: has no split {wanted!r}; {nearest(wanted, found)}")
            return found[wanted].to_iterable_dataset() if streaming else found[wanted]
        source = str(folder) if folder.is_dir() else place
        if outside := files_outside(folder):
            raise DataError(f"data.{split}={path}: its README.md names files outside the folder: {', '.join(outside)}")
        return datasets.load_dataset(source, name=subset, split=wanted, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if unreachable(error):
            raise DataError(
                f"data.{split}={path}: is not in the local cache, and the hub can't be reached. Connect once, or fetch "
                f"it elsewhere with `hf download --repo-type dataset {place}` and give the folder: data.{split}=FOLDER"
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise DataError(f"data.{split}={path}: can't be opened: {reason}") from error


def files_outside(folder: Path) -> list[str]:
    """The files that the metadata in a folder's README.md names and that aren't in the folder: URLs, other places.

    `datasets` would fetch and read them.
    """
    import yaml

    page = folder / "README.md"
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    block = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise DataError(f"{page}: its metadata is not YAML: {' '.join(str(error).split())}") from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    named = [each for config in configs or [] for key in ("data_files", "data_dir") for each in _texts(config.get(key))]
    inside = folder.resolve()
    return [name for name in named if "://" in name or not (inside / name).resolve().is_relative_to(inside)]


def _texts(value: Any) -> list[str]:
    """All texts in a value of any depth."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _texts(part)]


def _undecoded(dataset: Any) -> Any:
    """The set with its images as they are stored: they are decoded, and bounded, by us."""
    import datasets

    def stored(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(stored(feature.feature), length=feature.length)
        return {name: stored(inner) for name, inner in feature.items()} if isinstance(feature, dict) else feature

    dataset = dataset.with_format(None)  # a saved set remembers the tensors, or the columns, it was last read as
    if dataset.features is None:  # a stream that has not been looked at
        dataset = dataset._resolve_features()
    for column, feature in dataset.features.items():
        if (changed := stored(feature)) != feature:
            dataset = dataset.cast_column(column, changed)
    return dataset


def _of_images(feature: Any) -> bool:
    """Whether a column holds images, or lists of them."""
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


class HubReader(Reader):
    """Reads rows of a data set: their cells as the set's features say, for instance classes by name."""

    def __init__(self, dataset: Any, config: DataConfig, task: TaskConfig, name: str, answers_required: bool):
        columns = list(dataset.features)
        texts = columns_with_text(_first_cells(dataset))
        if problems := column_problems(columns, config.columns, name, answers_required, task, texts):
            raise DataError(problems)
        super().__init__(config, task, name, answers_required, columns)
        tell_unread(name, columns, config, self.refusable)
        converters = {column: of_feature(feature) for column, feature in dataset.features.items()}
        self.converters = {column: convert for column, convert in converters.items() if convert}

    def read_cells(self, row: int, cells: Mapping[str, Any]) -> tuple[Record, list[str]]:
        return super().read_cells(row, self.converted(cells))

    def converted(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its values as their source wrote them."""
        return {name: self.converters[name](cell) if name in self.converters else cell for name, cell in cells.items()}


def _first_cells(dataset: Any) -> dict[str, list[Any]]:
    """The first cells of each column, a stream's or a set's."""
    rows = list(dataset.take(SAMPLE if hasattr(dataset, "__len__") else 1))
    return {name: [row[name] for row in rows] for name in dataset.features}


class CheckedReader:
    """Reads rows and opens each distinct image once, as `data.check_images` says."""

    def __init__(self, reader: Reader, config: DataConfig):
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
        self.dataset, self.name = _undecoded(dataset), name

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int = 0) -> Split:
        """Read every row once, its images as `data.check_images` says; keep the good ones for reading again."""
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
        reader.tell()
        split.records = HubRows(self.dataset, reader, good, groups, digest.hexdigest())
        reader.tell_images(split.records, self.dataset.column_names)
        return split


class HubRows(Records):
    """The usable rows of a split, read from disk when asked for."""

    on_demand = True

    def __init__(self, dataset: Any, reader: HubReader, rows: list[int], groups: list[Hashable], fingerprint: str):
        self.dataset, self.reader, self.rows = dataset, reader, rows
        self._groups, self._fingerprint = groups, fingerprint

    def groups(self) -> list[Hashable]:
        return self._groups

    def fingerprint(self) -> str:
        """Of the rows' contents as they were when they were audited, images included."""
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
        """These rows of the same set."""
        rows, groups = [self.rows[i] for i in indices], [self._groups[i] for i in indices]
        return HubRows(self.dataset, self.reader, rows, groups, f"{self._fingerprint} {rows[:1]}+{len(rows)}")

    def frame(self) -> pd.DataFrame:
        """The rows' columns without images, for predictions.csv."""
        import pandas as pd

        image = self.reader.names["image"]
        kept = [name for name, feature in self.dataset.features.items() if name != image and not _of_images(feature)]
        rows = self.dataset.select(self.rows).select_columns(kept)
        return pd.DataFrame([self.reader.converted(row) for row in rows], dtype=object)


class HubStream:
    """One split that is read while training goes on; of other splits the first rows are read at once."""

    def __init__(self, dataset: Any, name: str, split: str):
        self.dataset, self.name, self.split = _undecoded(dataset), name, split

    def audit(self, config: DataConfig, task: TaskConfig, answers_required: bool, seed: int = 0) -> Split:
        """Check the columns, and the rows of an evaluation; training rows are checked when their turn comes."""
        if self.split != "train":
            import datasets

            rows = list(self.dataset.take(config.max_eval_rows))
            table = datasets.Dataset.from_list(rows, features=self.dataset.features)
            return HubTable(table, self.name).audit(config, task, answers_required, seed)
        stream = self.dataset
        if config.shuffle_buffer > 1:
            stream = stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        reader = HubReader(self.dataset, config, task, self.name, answers_required)
        return Split(StreamedRows(stream, reader, config, seed))


class StreamedRows(Records):
    """Rows without an end: after the last comes the first again, shuffled anew. Bad ones stop the run, or are logged.

    Reading on is cheap; reading back starts from the beginning.
    """

    on_demand = streamed = True

    def __init__(
        self,
        dataset: Any,
        reader: Reader,
        config: DataConfig,
        seed: int,
        faults_of: Callable[[Record], list[str]] = lambda record: [],
    ):
        self.dataset, self.reader, self.config, self.seed = dataset, reader, config, seed
        self.faults_of = faults_of
        """What the model has against a row."""
        self.next, self.rows = 0, self._rows()

    def refusing(self, faults_of: Callable[[Record], list[str]]) -> StreamedRows:
        return StreamedRows(self.dataset, self.reader, self.config, self.seed, faults_of)

    def groups(self) -> list[Hashable]:
        return []

    def fingerprint(self) -> str:
        return f"stream of {self.reader.file}, {self.config.shuffle_buffer} rows shuffled, seed {self.seed}"

    def image_fingerprint(self) -> None:
        return None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < self.next:
            self.next, self.rows = 0, self._rows()
        while True:
            record = next(self.rows)
            self.next += 1
            if self.next > index:
                return record

    def _rows(self) -> Iterator[Record]:
        for epoch in itertools.count():
            self.dataset.set_epoch(epoch)
            usable = 0
            for row, cells in enumerate(self.dataset):
                record, faults = CheckedReader(self.reader, self.config)(row, cells)
                self.reader.tell()
                faults = faults or self.faults_of(record)
                if not faults:
                    usable += 1
                    yield record
                elif self.config.on_bad_row == "fail":
                    raise DataError(f"{record.place}: {'; '.join(faults)}; data.on_bad_row=drop leaves such rows out")
                else:
                    log.warning("left out %s: %s", record.place, "; ".join(faults))
            if not usable:
                raise DataError(f"{self.reader.file}: the stream has no row that can be used")
