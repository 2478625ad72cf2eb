"""JSON lists, lists inside a JSON object, and JSON lines.

    [{"image_path": "0.png", ...}, ...]                     data.train=FILE.json
    {"info": {...}, "annotations": [{...}, ...]}            data.train=FILE.json:annotations
    {"images": [{"id": 7, ...}], "annotations": [{"image_id": 7, ...}]}      the same: each row gets its image's columns

The third is COCO's form, with the columns `file_name` and `caption`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vlmtune.data.cells import from_json, to_json
from vlmtune.data.rows import Rows
from vlmtune.data.text_files import byte_fault, read_lines, read_text
from vlmtune.errors import DataError, nearest

log = logging.getLogger("vlmtune")

VQA_PAIR = """\
questions and answers are in two files; join them with pandas, naming images as your folder does:
    import json, pathlib, pandas as pd
    rows = lambda file, key: pd.DataFrame(json.loads(pathlib.Path(file).read_text())[key])
    q, a = rows(QUESTIONS, "questions"), rows(ANNOTATIONS, "annotations")
    t = q.merge(a[["question_id", "answers"]].rename(columns={"answers": "answer"}), on="question_id")
    t["answer"] = [[one["answer"] for one in many] for many in t["answer"]]
    t["image_path"] = t["image_id"].map("COCO_train2014_{:012d}.jpg".format)
    t.to_json("train.jsonl", orient="records", lines=True)"""


def read_json(path: Path, key: str | None = None) -> Rows:
    """Read a JSON list of objects, or the one that stands under `key` of an object."""
    text = read_text(path)
    try:
        found = from_json(text, object_pairs_hook=_object, strict=byte_fault(text) is None)
    except (ValueError, DataError) as error:
        known = isinstance(error, json.JSONDecodeError)
        line = f", line {error.lineno}, character {error.colno}" if known else ""  # type: ignore[union-attr]
        of_lines = text.lstrip().startswith("{") and "Extra data" in str(error)
        hint = "; a file with one object per line ends in .jsonl" if of_lines else ""
        raise DataError(f"{path}{line}: is {_broken(error)}{hint}") from None
    items, beside = (_list_in(found, key, path), found) if isinstance(found, dict) else (found, {})
    if not isinstance(items, list):
        raise DataError(f"{path}: holds {_kind(items)}; a list of objects is needed")
    if key is not None and not beside:
        raise DataError(f"{path}:{key}: the file holds a list, not an object with keys; leave out :{key}")
    rows, doubtful = Rows(), _is_doubtful(text)
    for item in items:
        rows.add(item, 0, _item_fault(item, doubtful))
    return _with_images(rows, beside, path) if key != "images" else rows


def read_json_lines(path: Path) -> Rows:
    """Read a file with one JSON object per line; blank lines are skipped."""
    rows, lines = Rows(), read_lines(path)
    if lines[0].strip() == "[":
        raise DataError(f"{path}: holds a JSON list; let its name end in .json")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fault, item = byte_fault(line), None
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
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _is_doubtful(text: str) -> bool:
    """Whether what this JSON holds may have characters that no text has."""
    return byte_fault(text) is not None or "\\ud" in text or "\\uD" in text


def _item_fault(item: Any, doubtful: bool) -> str | None:
    if not isinstance(item, dict):
        return f"no object: the row is {_kind(item)}; write {{...}}"
    if not doubtful:
        return None
    written = json.dumps(item, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        half = f"half a character: {written[error.start]!r} has no partner, which two \\u escapes make together"
        return byte_fault(written) or half
    return byte_fault(written)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


# ---------------------------------------------------------------- a list in an object


def _list_in(found: dict[str, Any], key: str | None, path: Path) -> Any:
    """The list under `key`, or the advice which keys there are."""
    lists = {name: rows for name, rows in found.items() if isinstance(rows, list) and rows}
    if key is not None:
        if key not in found:
            raise DataError(f"{path}:{key}: the object has no such key; {nearest(key, lists)}")
        unread = [name for name in found if name != key and not (name == "images" and _by_image(found[key]))]
        if unread:
            log.info("%s: the rows are those of %s; not read: %s", path, key, ", ".join(unread))
        return found[key]
    if any("question_id" in rows[0] for rows in lists.values() if isinstance(rows[0], dict)):
        raise DataError(f"{path}: {VQA_PAIR}")
    if lists:
        names = sorted(lists, key=lambda name: name == "images")
        shown = ", ".join(f"{path}:{name} ({len(lists[name])} rows)" for name in names)
        raise DataError(f"{path}: holds an object, and rows are a list; name its key behind the file: {shown}")
    if found and all(isinstance(column, dict) for column in found.values()):
        raise DataError(f"{path}: holds columns, not rows; write it by frame.to_json(..., orient='records')")
    raise DataError(f"{path}: holds an object; a list of objects is needed ([...])")


def _by_image(rows: Any) -> bool:
    return isinstance(rows, list) and any(isinstance(row, dict) and "image_id" in row for row in rows)


def _with_images(rows: Rows, beside: dict[str, Any], path: Path) -> Rows:
    """Each row with the columns of the image that its `image_id` names, where `images` stand beside the rows."""
    images = beside.get("images")
    if not (isinstance(images, list) and _by_image(rows.cells)):
        return rows
    of_id: dict[Any, dict[str, Any]] = {}
    for image in images:
        if not isinstance(image, dict) or "id" not in image:
            raise DataError(f"{path}:images: one is no object with an id: {image!s:.80}")
        if of_id.setdefault(image["id"], image) is not image:
            raise DataError(f"{path}:images: two have the id {to_json(image['id'])}")
    for position, row in enumerate(rows.cells):
        image = of_id.get(row.get("image_id"))
        if position not in rows.faults and image is None:
            rows.faults[position] = f"no image: none of images has the id {to_json(row.get('image_id'))}"
        rows.cells[position] = {**_columns(image), **row} if image is not None else {}
    return rows


def _columns(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name != "id"}
