"""Write the table of docs/models.md by running each of its cells on a tiny checkpoint: a minute on two cores."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
from cells import CELLS, FAMILIES, outcome, table

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- docs/make_models.py writes from here -->\n", "<!-- to here -->"


def page(written: str) -> str:
    """The page with `written` as its table."""
    text = PAGE.read_text(encoding="utf-8")
    return text[: text.index(BEGIN) + len(BEGIN)] + written + text[text.index(END) :]


def outcomes() -> dict[tuple[str, str, str], str]:
    """What each family does in each cell."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for family in FAMILIES:
            checkpoint = tiny.build(family, Path(root) / family)
            for storage, adapter in CELLS:
                folder = Path(root) / f"{family}_{storage}_{adapter}"
                found[family, storage, adapter] = outcome(checkpoint, folder, storage, adapter)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page(table(outcomes())), encoding="utf-8")
