"""JSON lists, lists inside a JSON object, and JSON lines.

    [{"image_path": "0.png", ...}, ...]                     data.train=FILE.json
    {"info": {...}, "annotations": [{...}, ...]}            data.train=FILE.json:annotations
    {"images": [{"id": 7, ...}], "annotations": [{"image_id": 7, ...}]}      the same: each row gets its image's columns
    {"0293": {"question": "...", ...}, ...}                 data.train=FILE.json, the keys in a column `key`

The third is COCO's format, with the columns `file_name` and `caption`; the fourth that of GQA and ScienceQA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.data.cells import from_json
from vlmtune.data.rows import FileRows
from vlmtune.data.sources.json_lists import kind_of, rows_in, with_images
from vlmtune.data.sources.text_files import byte_fault, read_lines, read_text
from vlmtune.errors import DataError


def read_json(path: Path, key: str | None = None) -> FileRows:
    """Read a JSON list of objects, or the list at `key` of an object."""
    text = read_text(path)
    try:
        found = from_json(text, object_pairs_hook=_object, strict=byte_fault(text) is None)
    except (ValueError, DataError) as error:
        known = isinstance(error, json.JSONDecodeError)
        line = f", line {error.lineno}, character {error.colno}" if known else ""  # type: ignore[union-attr]
        of_lines = text.lstrip().startswith("{") and "Extra data" in str(error)
        hint = "; a file with one object per line must be named .jsonl" if of_lines else ""
        raise DataError(f"{path}{line}: is {_broken(error)}{hint}") from None
    items, beside = rows_in(found, key, path)
    rows, doubtful = FileRows(), _is_doubtful(text)
    for item in items:
        rows.add(item, 0, _item_fault(item, doubtful))
    return with_images(rows, beside, path) if key != "images" else rows


def read_json_lines(path: Path) -> FileRows:
    """Read a file with one JSON object per line; blank lines are skipped."""
    rows, lines = FileRows(), read_lines(path)
    if lines[0].strip() == "[":
        raise DataError(f"{path}: holds a JSON list; its name must end in .json")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item: Any = None
        fault = byte_fault(line)
        if fault is None:
            try:
                item = from_json(line, object_pairs_hook=_object)
                fault = _item_fault(item, _is_doubtful(line))
            except (ValueError, DataError) as error:
                fault = _broken(error)
        rows.add(item, number, fault)
    return rows


def _broken(error: Exception) -> str:
    if isinstance(error, DataError):
        return f"not JSON that can be read: {error}"
    return f"not JSON: {getattr(error, 'msg', error)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return found


def _is_doubtful(text: str) -> bool:
    """Whether this JSON may contain invalid characters."""
    return byte_fault(text) is not None or "\\ud" in text or "\\uD" in text


def _item_fault(item: Any, doubtful: bool) -> str | None:
    if not isinstance(item, dict):
        return f"not an object: the row is {kind_of(item)}; write {{...}}"
    if not doubtful:
        return None
    written = json.dumps(item, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        half = f"half a character: {written[error.start]!r} is half of a pair of \\u escapes"
        return byte_fault(written) or half
    return byte_fault(written)
