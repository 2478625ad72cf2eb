"""A comparison on the terminal."""

from __future__ import annotations

from vlmtune import display
from vlmtune.comparison.ranking import Comparison, Entry
from vlmtune.config.trial_names import short_keys


def table(found: Comparison, most: int | None = None) -> str:
    """The best `most` entries (None: all) with their intervals and verdicts, what is left out, and the notes."""
    lines = []
    if found.entries:
        title = f"{found.metrics[0]} on {len(found.rows)} rows about {found.images} images"
        share = f"{100 * found.confidence:g} %"
        columns = ("run", "what differs", "mean", share, f"to the best, {share}", "verdict")
        lines.append(display.table(title, columns, [_row(entry, found) for entry in found.entries[:most]]))
        if most is not None and len(found.entries) > most:
            lines.append(f"... and {len(found.entries) - most} more")
    else:
        lines.append("No run to compare yet: none has ended with evaluated rows.")
    lines += [f"{run.name}: {shortened(reason)}" for run, reason in found.left_out]
    lines += [f"Note: {note}." for note in found.notes]
    return "\n".join(lines)


def summary(found: Comparison) -> str:
    """The result in a sentence or two."""
    metric, best, others = found.metrics[0], found.entries[0], len(found.entries) - 1
    score = best.scores[metric]
    said = f"Best: run {label(best, found)}, {metric} {score.mean:.4f} ({interval(score.low, score.high)})"
    ties = sum(entry.scores[metric].verdict == "tie" for entry in found.entries)
    verdict = f"; {others - ties} of {others} others are worse, {ties} tie with it" if others else ""
    return f"{said}{verdict}. {len(found.rows)} rows about {found.images} images."


def _row(entry: Entry, found: Comparison) -> tuple[str, ...]:
    score = entry.scores[found.metrics[0]]
    spread = "" if score.spread is None else f" (sd {score.spread:.4f})"
    apart = f"{score.difference:+.4f} ({interval(score.difference_low, score.difference_high, '+')})"
    return (
        entry.name,
        swept(entry, found),
        f"{score.mean:.4f}{spread}",
        interval(score.low, score.high),
        "" if score.verdict == "best" else apart,
        score.verdict,
    )


def interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def shortened(text: str, most: int = 160) -> str:
    """A message on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def label(entry: Entry, found: Comparison) -> str:
    """An entry in a few words: `3: r=4 learning_rate=1e-3`."""
    words = swept(entry, found)
    return f"{entry.name}: {words}" if words else entry.name


def swept(entry: Entry, found: Comparison) -> str:
    """What tells an entry from the others: `r=4 learning_rate=1e-3`."""
    pairs = zip(short_keys(found.keys), (entry.swept.get(key) for key in found.keys), strict=True)
    return " ".join(f"{name}={value}" for name, value in pairs if value is not None)
