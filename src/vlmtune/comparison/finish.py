"""The last lines of a sweep."""

from __future__ import annotations

from pathlib import Path

from vlmtune.comparison import page
from vlmtune.comparison.ranking import compare
from vlmtune.comparison.texts import table

PAGE = "compare.html"
BEST = 5


def finish(sweep: Path) -> str:
    """Write the sweep's compare.html; returns the head of its table, and where the page is.

    It never raises, since the trials themselves are done: what prevents the comparison is said in its place.
    """
    try:
        found = compare([sweep])
        return f"{table(found, BEST)}\n  compared     {page.write(sweep / PAGE, found)}"
    except Exception as error:
        return f"The trials could not be compared; their results are not affected: {type(error).__name__}: {error}"
