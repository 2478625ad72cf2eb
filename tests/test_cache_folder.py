"""The image cache on disk: an entry that can't be trusted is computed again, and a disk that refuses ends nothing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmtune.config.schema import DataConfig
from vlmtune.prompt import cache_folder, image_cache
from vlmtune.prompt.cache_folder import CacheFolder, Entry, read_entry, write_entry
from vlmtune.prompt.image_cache import PixelStore

KEY = "ab" + "0" * 62


def entry(value: float = 1.0) -> Entry:
    layers = [[torch.full((2, 3), value + 1)], [torch.full((2, 3), value + 2)]]
    grid = {"image_grid_thw": torch.tensor([[1, 2, 2]])}
    return Entry(grid, ["<image>"], [torch.full((2, 3), value, dtype=torch.bfloat16)], False, layers)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "features" / "mark" / KEY[:2] / f"{KEY}.safetensors"


@pytest.fixture
def folder(place: Path) -> CacheFolder:
    folder = CacheFolder(place.parents[1])
    folder.put(KEY, entry())
    return folder


def test_an_entry_comes_back_as_it_was(folder: CacheFolder) -> None:
    found = folder.get(KEY)
    assert found is not None
    wanted = entry()
    assert (found.expansions, found.stacked) == (wanted.expansions, wanted.stacked)
    for name in ("inputs", "pooled", "deepstack"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)
    assert folder.get("cd" + KEY[2:]) is None


def flipped(at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def of_another_image(path: Path) -> None:
    other = path.with_name("ab" + "1" * 62 + ".safetensors")
    write_entry(other, entry(7))
    other.replace(path)


def of_another_model(path: Path) -> None:
    other = path.parents[2] / "another mark" / path.parent.name / path.name
    write_entry(other, entry(7))
    other.replace(path)


def without_checksum(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"pooled.0000": torch.ones(2, 3)}, path, {"expansions": '["<image>"]', "stacked": "true"})


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped in the header": flipped(0.02),
    "flipped in the metadata": flipped(0.2),
    "flipped in the last byte": flipped(1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("a note"),
    "zeros after a power failure": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another image": of_another_image,
    "of another model": of_another_model,
    "of an older version": without_checksum,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_as_it_was_written_is_computed_again(
    folder: CacheFolder, place: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    caplog.set_level(logging.WARNING, "vlmtune")
    damage(place)
    assert folder.get(KEY) is None
    assert folder.get(KEY) is None
    assert len(caplog.records) == 1, "said once"
    assert str(place) in caplog.text
    folder.put(KEY, entry())
    assert folder.get(KEY) is not None, "and replaced"


def test_a_disk_that_refuses_ends_only_the_caching_on_disk(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full one: whatever is computed is still handed on, and there is one warning."""
    monkeypatch.setattr(image_cache, "STORES", {})
    caplog.set_level(logging.WARNING, "vlmtune")
    (place.parents[2] / "pixels").mkdir(parents=True)
    (place.parents[2] / "pixels" / "mark").write_text("a file where the folder would be: nothing can be written")
    cache = PixelStore("mark", DataConfig(cache_features="disk", cache_folder=str(place.parents[2])))
    computed: list[Any] = []

    def images(groups: list[list[Any]]) -> tuple[dict[str, Any], list[str]]:
        computed.append(groups)
        return {"pixel_values": torch.ones(1, 3)}, ["<image>"]

    for content in (b"one", b"two", b"one"):
        inputs, expansions = cache.of([([content], [lambda content=content: content])], images)
        assert inputs["pixel_values"].shape == (1, 3)
        assert expansions == ["<image>"]
    assert len(computed) == 2, "the third is in memory"
    written = [record for record in caplog.records if "can't be written" in record.getMessage()]
    assert len(written) == 1


def test_a_failed_write_leaves_nothing(folder: CacheFolder, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_folder.os, "replace", full)
    folder.put(KEY, entry(5))
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert not folder.writable
    kept = folder.get(KEY)
    assert kept is not None, "what is there is still read"
    assert kept.pooled[0][0, 0] == 1


def test_parts_of_killed_writers_are_cleaned_up(folder: CacheFolder, place: Path) -> None:
    old, new = place.with_suffix(".1.part"), place.with_suffix(".2.part")
    for part in (old, new):
        part.write_text("half")
    os.utime(old, (time.time() - 3600,) * 2)
    CacheFolder(folder.folder)
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"


def _write_many(path: Path, value: float) -> None:
    torch.set_num_threads(1)
    for _ in range(30):
        write_entry(path, entry(value))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_writers_never_mix(place: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_many, args=(place, value)) for value in (1.0, 7.0)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if place.exists():
            seen.add(float(read_entry(place).pooled[0][0, 0]))  # raises where the two are mixed
    assert seen <= {1.0, 7.0}
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_the_folder_may_move(folder: CacheFolder, tmp_path: Path) -> None:
    shutil.move(folder.folder.parent, tmp_path / "elsewhere")
    assert CacheFolder(tmp_path / "elsewhere" / "mark").get(KEY) is not None
