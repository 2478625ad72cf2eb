"""Paths as a shell's user types them reach the run as they are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmtune.cli.resumed import folder_of_run
from vlmtune.config import compose, paths
from vlmtune.errors import ConfigError, StorageError

NAMES = (
    "a b.csv",
    "x=1.csv",
    "a[1](2){3}.csv",
    "ünï.csv",
    "it's.csv",
    'say "hi".csv',
    "a#b;c&d!.csv",
    "C:\\x\\y.csv",
    "a, b.csv",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["data.train", "model.path", "hydra.run.dir"])
def test_a_name_is_read_as_it_is_written(key: str, name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.touch()
    (override,) = compose.parse([f"{key}={place}"])
    assert override.value() == str(place)
    (again,) = compose.parse([override.input_line])
    assert again.value() == str(place)


def test_the_home_folder_is_meant_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for key in paths.KEYS:
        assert compose.parse([f"{key}=~/my data"])[0].value() == "/home/somebody/my data"
    assert compose.parse(["data.train=[~/a.csv,b.csv]"])[0].value() == ["/home/somebody/a.csv", "b.csv"]
    values = compose.parse(["data.train=~/a.csv,~/b.csv"])[0].sweep_iterator()
    assert [value.text for value in values] == ["/home/somebody/a.csv", "/home/somebody/b.csv"]
    raw = {"data": {"image_root": {"train": "~/x"}, "columns": {"image": "~"}}, "model": {"path": "~/m"}}
    assert paths.expand(raw) == {
        "data": {"image_root": {"train": "/home/somebody/x"}, "columns": {"image": "~"}},
        "model": {"path": "/home/somebody/m"},
    }


def test_a_comma_separates_unless_a_file_has_that_name(tmp_path: Path) -> None:
    assert compose.parse(["data.train=a.csv,b.csv"])[0].is_sweep_override()
    (tmp_path / "a.csv,b.csv").touch()
    assert not compose.parse([f"data.train={tmp_path}/a.csv,b.csv"])[0].is_sweep_override()


def test_a_name_that_begins_with_a_tilde_is_a_file_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody.csv").touch()
    assert compose.parse(["data.train=~nobody.csv"])[0].value() == str(tmp_path / "~nobody.csv")
    for word in ("data.train=~nobody-at-all/a.csv", "data.train=[~nobody-at-all/a.csv,b.csv]", "run=~nobody-at-all"):
        with pytest.raises(ConfigError, match="there is no user 'nobody-at-all'"):
            compose.parse([word])


def test_the_place_in_an_images_name_is_no_mapping() -> None:
    for name in ("{}.jpg", "{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "img ({}).png"):
        assert compose.parse([f"data.image_name={name}"])[0].value() == name
    roots = {"train": "a b", "test": "c=d"}
    for typed in ("{train: a b, test: 'c=d'}", "{train: a b, test: c=d}"):
        assert compose.parse([f"data.image_root={typed}"])[0].value() == roots


@pytest.mark.parametrize("word", ["task.caption_prompt=What? (short)", "task.caption_prompt=Yes, or no"])
def test_an_error_shows_the_quoting_that_works(word: str) -> None:
    with pytest.raises(ConfigError, match=r"'task\.caption_prompt=\"") as caught:
        compose.read("train", [word])
    shown = str(caught.value).rsplit(": '", 1)[1].rstrip("'")
    config, _ = compose.read("train", [shown])
    assert config.task.caption_prompt == word.split("=", 1)[1]


def test_a_resumed_run_goes_on_in_its_folder_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    words = folder_of_run(["resume=~/outputs/a=b (2)"])
    assert compose.parse(words)[0].value() == "/home/somebody/outputs/a=b (2)"
    assert folder_of_run(["resume=null"]) == []


def test_a_folder_that_can_not_be_made_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is a file"):
        paths.check_writable(tmp_path / "file" / "run")
    if os.access("/proc/1", os.F_OK):
        with pytest.raises(StorageError, match="can't be created"):
            paths.check_writable(Path("/proc/sys/kernel/run"))
    paths.check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
