"""The size of things: a function is read at a glance, and the page of a run is a page."""

from __future__ import annotations

import ast
from pathlib import Path

import vlmtune

PACKAGE = Path(vlmtune.__file__).parent
LONGEST, PAGE = 40, 99
"""Lines of a function, and of run.py."""


def test_no_function_is_long() -> None:
    functions = [
        (file.relative_to(PACKAGE), node.name, node.end_lineno - node.lineno + 1)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert functions
    assert [function for function in functions if function[2] > LONGEST] == []


def test_a_run_is_one_page() -> None:
    assert len((PACKAGE / "run.py").read_text(encoding="utf-8").splitlines()) <= PAGE
