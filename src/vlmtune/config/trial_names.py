"""Names of sweeps and of their trials: they say what differs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

SEED = "trainer.seed"
"""Trials that differ in it alone are the same but for chance."""
LONGEST = 100
"""Letters of a sweep's name; a file system takes 255 bytes."""
SHORT = {"learning_rate": "lr"}
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?", re.IGNORECASE)


def sweep_name(sweeps_file: str | None, keys: Sequence[str]) -> str:
    """The name of the file in sweeps/, else the swept keys, as many as a folder's name has room for; `trials` where
    nothing is swept.

    >>> sweep_name(None, ["adapter.r", "trainer.learning_rate"])
    'adapter.r,trainer.learning_rate'
    """
    return (sweeps_file or ",".join(keys) or "trials").replace("/", ".")[:LONGEST].rstrip(",.")


def trial_name(swept: Sequence[str]) -> str:
    """What differs, short: the last part of each key, or more of it where two keys would be the same.

    >>> trial_name(["adapter.r=8", "trainer.learning_rate=0.0002"])
    'r=8 lr=2e-4'
    >>> trial_name(["adapter.parts=[language]", "quantization.parts=[language]"])
    'adapter.parts=[language] quantization.parts=[language]'
    """
    pairs = [override.lstrip("+").partition("=") for override in swept]
    names = short_keys([key for key, _, _ in pairs])
    return " ".join(f"{name}={_short_value(value)}" for name, (_, _, value) in zip(names, pairs, strict=True))


def short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or more parts where two would be the same."""
    parts = [key.split(".") for key in keys]
    counts = Counter(".".join(own[-size:]) for own in parts for size in range(1, len(own) + 1))
    found = []
    for own in parts:
        size = next((size for size in range(1, len(own)) if counts[".".join(own[-size:])] == 1), len(own))
        found.append(".".join([*own[-size:-1], SHORT.get(own[-1], own[-1])]))
    return found


def _short_value(text: str) -> str:
    """Fractions with three digits, with an exponent where that is shorter: 2e-4; a text without its quotes."""
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    if not FRACTION.fullmatch(text):
        return text
    plain = f"{float(text):.3g}"
    digits, _, exponent = f"{float(text):.2e}".partition("e")
    digits = digits.rstrip("0").rstrip(".")
    scientific = f"{digits}e{int(exponent)}"
    return scientific if "e" in plain or len(scientific) < len(plain) else plain
