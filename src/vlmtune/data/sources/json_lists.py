"""Finds the rows in a JSON file: a list, the list at a key, or the values of an object."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlmtune.data.cells import to_json
from vlmtune.data.rows import FileRows
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


def rows_in(found: Any, key: str | None, path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The rows in a file's content `found`, at `key` if one is given, and the object around them.

    Raises DataError that suggests where the rows may be.
    """
    if not isinstance(found, dict):
        if key is not None:
            raise DataError(f"{path}:{key}: the file holds {kind_of(found)}, not an object with keys; leave out :{key}")
        rows, beside = found, {}
    else:
        rows, beside = (found, {}) if key is None else (_under(found, key, path), found)
    if isinstance(rows, dict):
        rows = _rows_by_key(rows, path, key)
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {kind_of(rows)}; a list of objects is needed")
    if key is not None and _is_half(rows):
        raise DataError(f"{path}:{key}: {VQA_PAIR}")
    return rows, beside


def kind_of(value: Any) -> str:
    """The JSON type of a value, for messages."""
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _under(found: dict[str, Any], key: str, path: Path) -> Any:
    if key not in found:
        lists = [name for name, rows in found.items() if isinstance(rows, list | dict) and rows]
        raise DataError(f"{path}:{key}: the object has no such key; {nearest(key, lists)}")
    unread = [name for name in found if name != key and not (name == "images" and _by_image(found[key]))]
    if unread:
        log.info("%s: the rows are those of %s; not read: %s", path, key, ", ".join(unread))
    return found[key]


def _rows_by_key(found: dict[str, Any], path: Path, key: str | None) -> list[dict[str, Any]]:
    """The rows of an object with one row per key, as in GQA and ScienceQA; the keys become a column.

    Raises DataError for any other object.
    """
    lists = {name: rows for name, rows in found.items() if isinstance(rows, list) and rows}
    rows = {name: items for name, items in lists.items() if any(isinstance(item, dict) for item in items)}
    if any(_is_half(items) for items in rows.values()):
        raise DataError(f"{path}: {VQA_PAIR}")
    if rows and key is None:
        names = sorted(rows, key=lambda name: name == "images")
        shown = ", ".join(f"{path}:{name} ({len(rows[name])} rows)" for name in names)
        raise DataError(f"{path}: holds an object, not a list of rows; add the key of the list: {shown}")
    values = [*found.values()]
    of_pandas = bool(found) and all(isinstance(column, dict) and all(map(str.isdigit, column)) for column in values)
    if of_pandas or (lists and not rows and len(lists) == len(found)):
        raise DataError(f"{path}: holds columns, not rows; write it with frame.to_json(..., orient='records')")
    if not found or not all(isinstance(row, dict) for row in values):
        raise DataError(f"{path}: holds an object; a list of objects is needed ([...])")
    if not any(isinstance(cell, str) for row in values for cell in row.values()):
        raise DataError(f"{path}: holds nested objects; put a list of rows that is deeper inside into a separate file")
    log.info("%s: the rows are the values of an object; its keys are the column 'key'", path)
    return [{"key": name, **row} for name, row in found.items()]


def _is_half(rows: list[Any]) -> bool:
    """Whether rows are questions without answers, or answers without questions, as in the file pairs of VQAv2 and
    OK-VQA.
    """
    keys = rows[0].keys() if rows and isinstance(rows[0], dict) else set()
    return "question_id" in keys and "image_id" in keys and ("question" in keys) != ("answers" in keys)


def _by_image(rows: Any) -> bool:
    return isinstance(rows, list) and any(isinstance(row, dict) and "image_id" in row for row in rows)


def with_images(rows: FileRows, beside: dict[str, Any], path: Path) -> FileRows:
    """Add to each row the columns of the image with its `image_id`, if the file has a list `images`."""
    images = beside.get("images")
    if not (isinstance(images, list) and _by_image(rows.cells)):
        return rows
    of_id: dict[Any, dict[str, Any]] = {}
    for image in images:
        if not isinstance(image, dict) or "id" not in image:
            raise DataError(f"{path}:images: one is not an object with an id: {image!s:.80}")
        if of_id.setdefault(image["id"], image) is not image:
            raise DataError(f"{path}:images: two have the id {to_json(image['id'])}")
    for position, row in enumerate(rows.cells):
        image = of_id.get(row.get("image_id"))
        if position not in rows.faults and image is None:
            rows.faults[position] = f"no image: the list `images` has no id {to_json(row.get('image_id'))}"
        rows.cells[position] = {**_columns(image), **row} if image is not None else {}
    return rows


def _columns(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name != "id"}
