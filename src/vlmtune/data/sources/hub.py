"""Data sets of Hugging Face's `datasets`: a folder that it wrote or can read, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlmtune.config.schema import DataConfig
from vlmtune.data.sources.hub_rows import HubTable
from vlmtune.data.sources.hub_stream import HubStream
from vlmtune.errors import DataError, nearest, to_install
from vlmtune.network import unreachable

SPLITS = ("train", "validation", "test")


def load(config: DataConfig) -> dict[str, HubTable | HubStream]:
    """Open the data sets in `data.train`, `data.validation` and `data.test`: PATH_OR_ID, or PATH_OR_ID:SPLIT.

    Without :SPLIT, the split has the same name as the key. Raises DataError for a missing data set, split or network.
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
        raise DataError(f"data=hub needs the package datasets: {to_install('datasets')}") from None
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
    """Files outside the folder (URLs, other paths) that the metadata in its README.md names.

    `datasets` would download and read them.
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
    """All texts in a nested value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _texts(part)]
