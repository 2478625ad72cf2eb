"""A plan as a person reads it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vlmtune.commands import typed
from vlmtune.planning.advice import GIB, Fit
from vlmtune.planning.estimate import Estimate

ORDER = ("vision", "projector", "cross_attention", "language", "head")


def table(estimate: Estimate, what: str, processes: int = 1) -> str:
    """What takes how much, and the sum. `what`: the micro-batch in words."""
    passing, own = estimate.passing, estimate.weights
    kinds = sorted(own.items(), key=lambda item: ORDER.index(item[0][0]) if item[0][0] in ORDER else 9)
    base = {name: size for name, size in kinds if name[0] not in ("adapter", "buffers")}
    whole = sum(base.values()) + sum(size for name, size in kinds if name[0] == "buffers")
    adapter = sum(size for name, size in kinds if name[0] == "adapter")
    by_part = ", ".join(f"{part} {size / GIB:.2f} in {kind}" for (part, kind), size in base.items())
    rows = [("weights", float(whole), by_part)]
    if adapter:
        rows.append(("adapter", float(adapter), "its own weights"))
    if (shared := estimate.kept - whole - adapter) < -1:
        rows.append(("shared out", shared, f"a share of 1/{processes}, and the layers that are gathered at a time"))
    rows.append(("optimizer", estimate.state, _elsewhere(estimate)))
    if estimate.updates_in_backward or passing.total >= estimate.gradients + estimate.update:
        rows.append(("gradients", passing.gradients, "as far as they are there when a pass holds the most"))
        rows.append(("activations", passing.activations, f"{what}: forward and backward, with logits of the answers"))
        if estimate.updates_in_backward:
            rows.append(("update", estimate.update, "copies of the largest weight"))
    else:
        rows.append(("gradients", estimate.gradients, "of all trained weights"))
        rows.append(("update", estimate.update, f"copies of the largest weight; a pass ({what}) has ended"))
    rows.append(("CUDA", estimate.context, "its context, libraries, gaps; an assumption"))
    lines = [f"  {name:12} {size / GIB:8.2f} GiB   {note}" for name, size, note in rows]
    lines.append(f"  {'sum':12} {estimate.training / GIB:8.2f} GiB   {'on each GPU' if processes > 1 else ''}".rstrip())
    if estimate.startup > estimate.training:
        lines.append(
            f"  {'at the start':12} {estimate.startup / GIB:8.2f} GiB   the whole model, before it is shared out"
        )
    return "\n".join(lines)


def _elsewhere(estimate: Estimate) -> str:
    return f"its state; {estimate.host / GIB:.2f} GiB in main memory" if estimate.host else "its state"


def cards(found: Sequence[Fit]) -> str:
    """A line for each card."""
    lines = [f"  {'card':8} {'fits':5} {'rows':>5}   with"]
    for fit in found:
        answer = "yes" if fit.fits else "no"
        with_ = "" if fit.fits else " ".join(fit.variant.words) if fit.variant else "nothing that is known here"
        lines.append(f"  {fit.card:8} {answer:5} {fit.largest or '-':>5}   {with_}".rstrip())
    return "\n".join(lines)


def command(found: Sequence[Fit], overrides: Sequence[str]) -> str | None:
    """The command that runs on the smallest card that takes it, after as few changes as it needs."""
    fitting = next((fit for fit in found if fit.largest), None)
    if fitting is None:
        return None
    words = fitting.variant.words if fitting.variant else ()
    changed = {word.split("=")[0] for word in words}
    kept = [override for override in overrides if override.lstrip("+").split("=")[0] not in changed]
    return f"  on {fitting.card}: {typed('train')} {shlex.join([*kept, *words])}"
