"""Remembers what a function returned, in objects that are sent to other processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Memo:
    """`functools.lru_cache` for a method of one object. It can be pickled, which lru_cache can't: without its entries.

    `most`: number of entries, the latest used ones; None keeps all.
    """

    def __init__(self, function: Callable[..., Any], most: int | None = None):
        self.function, self.most = function, most
        self.remembered = functools.lru_cache(maxsize=most)(function)

    def __call__(self, *arguments: Any) -> Any:
        return self.remembered(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, (self.function, self.most)
