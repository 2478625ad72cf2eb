"""Reads text files, and finds rows with invalid bytes."""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path

from vlmtune.data.file_kinds import kind_of
from vlmtune.data.paths import whats_there
from vlmtune.errors import DataError

NOT_UTF8 = re.compile("[\udc80-\udcff]")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, with line ends; a byte that is not UTF-8 becomes a lone surrogate.

    Lines end with a line feed; if the file has none, with a carriage return.
    """
    text = read_text(path)
    return list(io.StringIO(text, newline="\n" if "\n" in text else ""))


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises DataError if it is not a text file."""
    content = _content(path)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{path}: is empty; rows are needed")
    if kind := kind_of(content[:64]):
        raise DataError(f"{path}: is {kind}")
    head = content[:4096]
    if head.count(b"\0") * 8 > len(head):
        raise DataError(f"{path}: contains many NUL bytes (UTF-16, or not a text file); save it as UTF-8 text")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _content(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a link to {path.readlink()}, which does not exist")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise DataError(f"{path}: is {kind}; a file is needed here")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {whats_there(path)}") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None


def byte_fault(text: str) -> str | None:
    """Why a row with this text, as `read_text` returns it, can't be used; None if nothing is wrong."""
    if text.isascii() and "\0" not in text:
        return None
    if "\0" in text:
        return "NUL byte: remove it, or write the file again"
    if wrong := NOT_UTF8.search(text):
        byte = f"byte 0x{ord(wrong[0]) - 0xDC00:02x}"
        return (
            f"undecodable: {byte} is not UTF-8; save the file as UTF-8, for instance by iconv -f WINDOWS-1252 -t UTF-8"
        )
    return None
