"""compare.html: a comparison as one page with nothing to load from anywhere else; it sorts and filters by itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vlmtune.comparison import plots
from vlmtune.comparison.differing import differing
from vlmtune.comparison.ranking import Comparison, Entry, Score
from vlmtune.comparison.texts import interval, label, summary
from vlmtune.config.trial_names import short_keys
from vlmtune.display import duration
from vlmtune.record import pages
from vlmtune.record.drawing import HEIGHT, PLOT, WIDTH, gibibytes, scale

HERE = Path(__file__).parent
BAR = 110
"""Width of an interval in the table, in pixels."""


def write(path: Path, found: Comparison) -> Path:
    """Write the page and return its path."""
    script, style = (HERE / "page.js").read_text("utf-8"), _style()
    return pages.write(
        path,
        HERE / "page.html.j2",
        found=found,
        title=_title(found),
        share=f"{100 * found.confidence:g} %",
        summary=summary(found) if found.entries else "",
        verdicts=Counter(entry.scores[found.metrics[0]].verdict for entry in found.entries),
        names=short_keys(found.keys),
        tables=[_table(found, metric) for metric in found.metrics] if found.entries else [],
        plots=plots.plots(found) if found.entries else [],
        parallel=plots.parallel(found) if found.entries else None,
        curves=plots.curves(found) if found.entries else [],
        most_curves=plots.MOST_CURVES,
        differing=_embedded(differing(found)) if len(found.entries) > 1 else None,
        script=script,
        style=style,
        allowed=(pages.source_hash(script), pages.source_hash(style)),
        size=(WIDTH, HEIGHT),
        wide=plots.WIDE,
        plot=PLOT,
        bar=BAR,
    )


def _title(found: Comparison) -> str:
    """The end of the folder that all runs lie in: a sweep's name and stamp."""
    runs = [run for entry in found.entries for run in entry.runs] + [run for run, _ in found.left_out]
    return "/".join(Path(os.path.commonpath([run.folder.resolve().parent for run in runs])).parts[-2:])


def _style() -> str:
    """The style of all pages, and this page's own."""
    return "\n".join([pages.STYLE.read_text("utf-8"), (HERE / "page.css").read_text("utf-8")])


def _embedded(values: dict[str, Any]) -> str:
    """JSON that can stand inside a script element: no text in it can end the element."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _table(found: Comparison, metric: str) -> dict[str, Any]:
    """A metric's table: cells as shown, with what they are sorted by."""
    scores = [entry.scores[metric] for entry in found.entries]
    place = scale(min(score.low for score in scores), max(score.high for score in scores), 4, BAR - 4)
    exact = any(score.mcnemar is not None for score in scores)
    spread = any(score.spread is not None for score in scores)
    return {
        "metric": metric,
        "exact": exact,
        "spread": spread,
        "rows": [_row(entry, entry.scores[metric], found, place) for entry in found.entries],
    }


def _row(entry: Entry, score: Score, found: Comparison, place: Any) -> dict[str, Any]:
    best = score.verdict == "best"
    return {
        "of": entry.name,
        "label": label(entry, found),
        "swept": [entry.swept.get(key, "") for key in found.keys],
        "verdict": score.verdict,
        "mean": score.mean,
        "interval": interval(score.low, score.high),
        "bar": (place(score.low), place(score.mean), place(score.high)),
        "spread": score.spread,
        "difference": None if best else score.difference,
        "apart": "" if best else interval(score.difference_low, score.difference_high, "+"),
        "p": None if best else score.p,
        "mcnemar": score.mcnemar,
        "seconds": (entry.seconds, duration(entry.seconds) if entry.seconds is not None else ""),
        "memory": (entry.memory, gibibytes(entry.memory) if entry.memory is not None else ""),
    }
