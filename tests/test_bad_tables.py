"""Bad tables: each costs the rows that are bad, says where and why, and keeps the others.

Of each file: what a run that stops says, and which rows are kept and left out by one that goes on.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.config.schema import DataConfig, TaskConfig
from vlmtune.data.bad_rows import BadRowsError
from vlmtune.data.table import load
from vlmtune.errors import DataError

HEADER = b"image_path,question,answer\n"
GOOD, OTHER = b"0.png,what?,red\n", b"1.png,what?,red\n"
ROW = {"image_path": "0.png", "question": "what?", "answer": "red"}
OTHER_ROW = {**ROW, "image_path": "1.png"}


def objects(*rows: Any) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a b#1.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<!DOCTYPE html><p>404")
    (tmp_path / "photo.png").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return tmp_path


def read(path: Path | str, **data: Any) -> Any:
    return load(DataConfig(train=str(path), **data), TaskConfig(), 0)["train"]


ROWS = {
    "NUL byte": ("csv", HEADER + GOOD + b"2.png,wh\0at?,red\n" + OTHER, "NUL byte", [(3, 2)], 2),
    "not UTF-8": ("csv", HEADER + GOOD + b"2.png,caf\xe9?,red\n" + OTHER, "byte 0xe9 is not UTF-8", [(3, 2)], 2),
    "text behind a quote": ("csv", HEADER + b'0.png,"a"b,red\n' + OTHER, "stray quote", [(2, 1)], 1),
    "quote never closed": ("csv", HEADER + b'2.png,"so,red\n' + GOOD + OTHER, "not closed before line 3", [(2, 1)], 2),
    "quote closed by the next one": (
        "csv",
        HEADER + b'2.png,"so,red\n' + GOOD + b'3.png,"hm?",red\n' + OTHER,
        "not closed before line 3",
        [(2, 1)],
        3,
    ),
    "two rows swallowed into one that has all its fields": (
        "csv",
        HEADER + b'2.png,"so,red\n' + GOOD + b'3.png,6",red\n' + OTHER,
        "not closed before line 3",
        [(2, 1)],
        3,
    ),
    "broken quote in a text of two lines": (
        "csv",
        HEADER + b'0.png,"two\nlines" hm,red\n' + OTHER,
        "stray quote",
        [(2, 1)],
        1,
    ),
    "a field too many": ("csv", HEADER + b"0.png,one, two?,red\n" + OTHER, "4 where the header has 3", [(2, 1)], 1),
    "fields too few": ("csv", HEADER + GOOD + b"\n0.png,who?\n", "2 where the header has 3", [(4, 2)], 1),
    "a field too many and a missing image are one fault": (
        "csv",
        HEADER + b"gone.png,a,b,c\n" + OTHER,
        "1 of 2 rows can't be used (1 x too many fields)",
        [(2, 1)],
        1,
    ),
    "carriage return in a field": ("csv", HEADER + b"0.png,wh\rat?,red\n" + OTHER, "carriage return", [(2, 1)], 1),
    "three rows, three kinds": (
        "csv",
        HEADER + b"0.png,a\n" + GOOD + b'0.png,"a"b,c\n' + OTHER + b"0.png,\xff,c\n",
        "3 of 5 rows can't be used (1 x too few fields, 1 x stray quote, 1 x undecodable)",
        [(2, 1), (4, 3), (6, 5)],
        2,
    ),
    "comma in a TSV is no separator": (
        "tsv",
        b"image_path\tquestion\tanswer\n0.png\ta\tb\tc\n1.png\ta, b\tc\n",
        "4 where the header has 3",
        [(2, 1)],
        1,
    ),
    "missing image": ("csv", HEADER + b"9.png,a?,b\n" + OTHER, "no such image", [(2, 1)], 1),
    "missing image in two rows": (
        "csv",
        HEADER + b"9.png,a?,b\n9.png,b?,b\n" + OTHER,
        "line 2, row 1 and 1 more: no such image",
        [(2, 1), (3, 2)],
        1,
    ),
    "missing image twice in a row": (
        "csv",
        HEADER + b'"[""9.png"", ""9.png""]",a?,b\n' + OTHER,
        "(1 x no such image)",
        [(2, 1)],
        1,
    ),
    "empty image": ("csv", HEADER + b"empty.png,a?,b\n" + OTHER, "has 0 bytes", [(2, 1)], 1),
    "web page for an image": ("csv", HEADER + b"page.png,a?,b\n" + OTHER, "its download failed", [(2, 1)], 1),
    "HEIC photo": ("csv", HEADER + b"photo.png,a?,b\n" + OTHER, "is an HEIC photo; save it as PNG", [(2, 1)], 1),
    "image in Git LFS": ("csv", HEADER + b"pointer.png,a?,b\n" + OTHER, "git lfs pull", [(2, 1)], 1),
    "backslashes": (
        "csv",
        HEADER + b"pictures\\a b#1.png,a?,b\n" + OTHER,
        "write / in place of \\: ",
        [(2, 1)],
        1,
    ),
    "drive of Windows": ("csv", HEADER + b"C:\\data\\0.png,a?,b\n" + OTHER, "separated by /, not", [(2, 1)], 1),
    "file URI with a host": ("csv", HEADER + b"file://pictures/0.png,a?,b\n" + OTHER, "three slashes", [(2, 1)], 1),
    "file URI of nothing": ("csv", HEADER + b"file:///gone/0.png,a?,b\n" + OTHER, "/gone/0.png", [(2, 1)], 1),
    "URL": ("csv", HEADER + b"gs://bucket/0.png,a?,b\n" + OTHER, "download it first", [(2, 1)], 1),
    "JSON line cut": ("jsonl", objects(ROW, b'{"image_path": "0.', OTHER_ROW), "not JSON", [(2, 2)], 2),
    "two objects in a JSON line": ("jsonl", objects(ROW, objects(ROW)[:-1] * 2), "Extra data", [(2, 2)], 1),
    "list in a JSON line": ("jsonl", objects(ROW, [1], OTHER_ROW), "not an object: the row is a list", [(2, 2)], 2),
    "key twice": ("jsonl", objects(ROW, b'{"answer": "a", "answer": "b"}'), "'answer' occurs twice", [(2, 2)], 1),
    "NUL in a JSON line": ("jsonl", objects(ROW, b'{"image_path": "0.png\0"}'), "NUL byte", [(2, 2)], 1),
    "byte in a JSON line": ("jsonl", objects(ROW, b'{"image_path": "\xff"}'), "byte 0xff", [(2, 2)], 1),
    "half an emoji": ("jsonl", objects(ROW, {**ROW, "answer": "\ud83d"}), "half a character", [(2, 2)], 1),
    "nested too deeply": ("jsonl", objects(ROW, b"[" * 100_000), "nested too deeply", [(2, 2)], 1),
    "null and text in a JSON list": ("json", objects([ROW, None, "x", OTHER_ROW]), "is null", [(0, 2), (0, 3)], 2),
    "byte in one item of a JSON list": (
        "json",
        b'[{"image_path": "0.png", "question": "\xff?", "answer": "b"}, ' + json.dumps(ROW).encode() + b"]",
        "byte 0xff",
        [(0, 1)],
        1,
    ),
    "image_id of no image": (
        "json:annotations",
        objects(
            {
                "images": [{"id": 1, "image_path": "0.png"}],
                "annotations": [{"image_id": n, "question": "a", "answer": "b"} for n in (1, 2)],
            }
        ),
        "the list `images` has no id 2",
        [(0, 2)],
        1,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_costs_itself_alone(name: str, folder: Path) -> None:
    form, content, reason, where, kept = ROWS[name]
    ending, colon, key = form.partition(":")
    (folder / f"t.{ending}").write_bytes(content)
    path = f"{folder}/t.{ending}{colon}{key}"
    with pytest.raises(BadRowsError) as caught:
        read(path)
    assert reason in str(caught.value)
    assert "data.on_bad_row=drop" in str(caught.value)
    split = read(path, on_bad_row="drop", max_bad_fraction=0.9)
    for bad in (caught.value.bad, split.bad):
        assert [(row.line, row.row) for row in bad] == where
        assert {row.file for row in bad} == {f"{folder}/t.{ending}"}
    assert len(split) == kept


FILES = {
    "NUL in the header": ("csv", b"image_path,quest\0ion,answer\n" + GOOD, "line 1: NUL byte"),
    "UTF-16": ("csv", (HEADER + GOOD).decode().encode("utf-16"), "is text in UTF-16"),
    "UTF-16 without its mark": ("csv", (HEADER + GOOD).decode().encode("utf-16-be"), "contains many NUL bytes"),
    "byte in the header": ("csv", b"image_path,question,r\xe9ponse\n" + GOOD, "line 1: undecodable"),
    "no header line": ("csv", GOOD + OTHER, "data.header=[image_path,question,answer]"),
    "two columns of one name": ("csv", b"answer,image_path,answer\nred,0.png,blue\n", "2 columns are named 'answer'"),
    "semicolons": ("csv", b"image_path;question;answer\n0.png;a?;b\n", "separated by ';'"),
    "tabs": ("csv", b"image_path\tquestion\tanswer\n0.png\ta?\tb\n", "must be named .tsv"),
    "commas in a TSV": ("tsv", HEADER + GOOD, "this file needs tabs"),
    "header alone": ("csv", HEADER, "has a header and no rows"),
    "blank lines": ("csv", b"\n \n", "is empty"),
    "byte order mark alone": ("csv", b"\xef\xbb\xbf", "is empty"),
    "gzip": ("csv", gzip.compress(HEADER + GOOD), "compressed by gzip"),
    "Excel": ("csv", zipped(), "an Excel workbook"),
    "Git LFS": ("csv", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "PDF": ("jsonl", b"%PDF-1.4\n", "is a PDF"),
    "other ending": ("txt", HEADER + GOOD, "supported are .csv, .tsv, .json, .jsonl, .parquet"),
    "JSON list in a file of lines": ("jsonl", json.dumps([ROW], indent=1).encode(), "its name must end in .json"),
    "no JSON line is JSON": ("jsonl", b"a\nb\n", "no row can be used"),
    "JSON cut": ("json", json.dumps([ROW, ROW]).encode()[:-5], "line 1, character"),
    "JSON lines in a .json": ("json", objects(ROW, ROW), "must be named .jsonl"),
    "a number": ("json", b"7", "holds a number"),
    "empty list": ("json", b"[]", "has no rows"),
    "pandas' columns": ("json", objects({key: {"0": value} for key, value in ROW.items()}), "orient='records'"),
    "empty object": ("json", b"{}", "a list of objects is needed"),
    "lists in an object": ("json", objects({"info": {}, "data": [ROW]}), "t.json:data (1 rows)"),
    "no such key": ("json:dat", objects({"data": [ROW]}), "did you mean data?"),
    "key of a list": ("json:data", objects([ROW]), "leave out :data"),
    "key of no list": ("json:info", objects({"info": {"a": 1}}), "holds an object"),
    "two images of one id": (
        "json:annotations",
        objects({"images": [{"id": 1}, {"id": 1}], "annotations": [{"image_id": 1}]}),
        "two have the id 1",
    ),
    "no Parquet": ("parquet", b"abc", "is not a Parquet file"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_with_a_whole_file_is_said_once(name: str, folder: Path) -> None:
    form, content, reason = FILES[name]
    ending, colon, key = form.partition(":")
    (folder / f"t.{ending}").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(f"{folder}/t.{ending}{colon}{key}", on_bad_row="drop")
    assert reason in str(caught.value)
    assert f"{folder}/t.{ending}" in str(caught.value)


def test_what_is_no_file_is_said_before_it_is_read(folder: Path) -> None:
    """Reading a pipe would wait for ever."""
    os.mkfifo(folder / "pipe.csv")
    (folder / "link.csv").symlink_to(folder / "nowhere.csv")
    (folder / "folder.csv").mkdir()
    for name, reason in {
        "pipe.csv": "is not a regular file",
        "link.csv": "is a link to",
        "folder.csv": "is a folder",
        "gone.csv": "no such file",
        "a.csv,b.csv": "write several files as a list: [",
    }.items():
        with pytest.raises(DataError, match=f"{reason}".replace("[", r"\[")):
            read(folder / name)


@pytest.mark.parametrize(
    "content",
    [
        (HEADER + GOOD + OTHER).replace(b"\n", b"\r"),
        (HEADER + GOOD + OTHER).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + HEADER + GOOD + OTHER.rstrip(),
        b"\n" + HEADER + b"\n" + GOOD + b"\n\n" + OTHER,
        HEADER + GOOD + b'1.png,"a,\nb,\n""c""\n",red\n',
    ],
    ids=["CR", "CRLF", "BOM", "blank lines", "lines in a cell"],
)
def test_line_ends_marks_and_blank_lines_are_no_fault(content: bytes, folder: Path) -> None:
    (folder / "t.csv").write_bytes(content)
    split = read(folder / "t.csv")
    assert [record.images[0].name for record in split.records] == ["0.png", "1.png"]
    assert not split.bad


def test_a_cell_may_be_as_long_as_an_image_in_base64(folder: Path) -> None:
    """The csv module stops at 131,072 characters; its limit, which others may rely on, is put back."""
    file = io.BytesIO()
    Image.effect_noise((400, 400), 100).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) > 131_072
    (folder / "t.csv").write_text(f'image_path,question,answer\n"data:image/png;base64,{text}",what?,noise\n')
    before = csv.field_size_limit()
    assert len(read(folder / "t.csv")) == 1
    assert csv.field_size_limit() == before


def test_a_table_without_a_header_is_read_by_the_names_given(folder: Path) -> None:
    (folder / "t.csv").write_bytes(b"red,0.png,what?\nblue,1.png,who?\n")
    split = read(folder / "t.csv", header=["answer", "image_path", "question"])
    assert [(record.question, record.answers, record.line) for record in split.records] == [
        ("what?", ("red",), 1),
        ("who?", ("blue",), 2),
    ]
    (folder / "t.csv").write_bytes(HEADER + GOOD)
    with pytest.raises(DataError, match=r"line 1: is a header already; leave out data\.header"):
        read(folder / "t.csv", header=["image_path", "question", "answer"])
    (folder / "t.json").write_bytes(objects([ROW]))
    with pytest.raises(DataError, match=r"data\.header is for CSV and TSV"):
        read(folder / "t.json", header=["image_path", "question", "answer"])


def test_file_uris_are_paths(folder: Path) -> None:
    uris = [f"file://{folder}/0.png", f"file://localhost{folder}/1.png", f"FILE:{folder}/2.png"]
    uris.append(f"file://{folder}/pictures/a%20b%231.png")
    (folder / "t.csv").write_text("image_path,question,answer\n" + "".join(f"{uri},a?,b\n" for uri in uris))
    found = [record.images[0] for record in read(folder / "t.csv").records]
    assert found == [folder.resolve() / name for name in ("0.png", "1.png", "2.png", "pictures/a b#1.png")]


def test_an_absent_number_is_no_misspelling_of_another(folder: Path) -> None:
    """`two_col_23230.png` and `two_col_23232.png` show different things."""
    for name in ("two_col_23232.png", "two_col_23231.png", "kitten_7.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    content = HEADER + b"two_col_23230.png,a?,b\nkiten_7.png,a?,b\n"
    (folder / "t.csv").write_bytes(content)
    with pytest.raises(BadRowsError) as caught:
        read(folder / "t.csv")
    reasons = [row.reason for row in caught.value.bad]
    assert "did you mean" not in reasons[0]
    assert reasons[1].endswith("did you mean kitten_7.png?")


def test_a_file_without_permission_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised in place of the system, which refuses nothing to the root user that tests may run as."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (folder / "t.csv").write_bytes(HEADER + GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"t\.csv: can't be read: Permission denied"):
        read(folder / "t.csv")
