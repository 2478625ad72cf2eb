"""Resolves the paths that users write, and suggests what may have been meant."""

from __future__ import annotations

import bisect
import difflib
import functools
import re
from pathlib import Path
from urllib.parse import unquote

from vlmtune.errors import DataError


def local_path(name: str) -> str:
    """The path that a user names, or that a `file://` URI names. Raises DataError for other URIs."""
    if re.match("file:/", name, re.IGNORECASE):
        host, slash, path = name[5:].removeprefix("//").partition("/")
        if host not in ("", "localhost"):
            raise DataError(f"image is on the host {host!r}: {name:.80}; a local file has three slashes (file:///...)")
        return unquote(slash + path)
    if re.match(r"\w[\w+.-]+://|data:", name):
        raise DataError(f"image is a URL: {name:.80}; download it first and give its path")
    return name


def existing(path: Path) -> Path:
    """This path, if it is a regular file. Raises DataError that says what it is instead."""
    if path.is_dir():
        raise DataError(f"not an image: {path}: is a folder; name a file in it")
    if path.is_symlink() and not path.exists():
        raise DataError(f"no such image: {path} is a link to {path.readlink()}, which does not exist")
    if not path.exists():
        raise DataError(f"no such image: {path}; {whats_there(path)}")
    if not path.is_file():
        raise DataError(f"not an image: {path}: is not a regular file")
    if not path.stat().st_size:
        raise DataError(f"empty image: {path} has 0 bytes; fetch it again")
    return path


def whats_there(path: Path) -> str:
    """A suggestion for a file that does not exist: a similar name in its folder, or the folder that is missing."""
    if "\\" in path.name:
        slashed = path.parent / path.name.replace("\\", "/")
        return (
            f"write / in place of \\: {slashed} exists" if slashed.exists() else "folders are separated by /, not by \\"
        )
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        return f"{folder} has no {path.absolute().relative_to(folder).parts[0]}"
    names, stems = _listing(folder, folder.stat().st_mtime_ns)
    if same_stem := stems.get(path.stem.casefold()):
        pattern = "" if path.suffix else f" For a column of such names: data.image_name={{}}{Path(same_stem).suffix}"
        return f"did you mean {same_stem}?{pattern}"
    position = bisect.bisect(names, path.name)
    neighbours = names[max(0, position - 4) : position + 4]  # in alphabetical order: a folder may hold a million
    same_number = [name for name in neighbours if _numbers(name) == _numbers(path.name)]
    close = difflib.get_close_matches(path.name, same_number, n=1)
    return f"did you mean {close[0]}?" if close else f"{folder} holds {len(names)} other names"


def _numbers(name: str) -> list[int]:
    """The numbers in a name: files whose numbers differ are different images, not typos."""
    return [int(digits) for digits in re.findall(r"[0-9]+", name)]


@functools.lru_cache(maxsize=8)
def _listing(folder: Path, modified: int) -> tuple[list[str], dict[str, str]]:
    """The names in a folder, sorted, and by lower-case stem. `modified` makes a changed folder a new cache entry."""
    names = sorted(entry.name for entry in folder.iterdir())
    return names, {Path(name).stem.casefold(): name for name in names}
