"""What a search searches: Hydra's grammar of several values as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmtune.config import compose
from vlmtune.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def split(params: Mapping[str, str] | None, arguments: Sequence[str]) -> tuple[dict[str, BaseDistribution], list[str]]:
    """The distribution of each searched key, and the overrides that all trials share.

    `params`: those of the sweeper; an argument for the same key takes its place. Raises ConfigError with every
    problem.
    """
    own = compose.normalise([f"{key}={values}" for key, values in (params or {}).items()])[0]
    words = {each.key_or_group: each for each in compose.parse([*own, *arguments])}
    found, fixed, problems = {}, [], []
    for override in words.values():
        if not override.is_sweep_override():
            fixed.append(override.input_line)
            continue
        try:
            found[override.input_line.partition("=")[0]] = distribution(override)
        except ValueError as error:
            problems.append(f"{override.input_line.lstrip('+')}: {error}")
    if not found and not problems:
        problems.append("hydra.sweeper.params: nothing to search; give a key several values: trainer.learning_rate=...")
    if problems:
        raise ConfigError(problems)
    return found, fixed


def distribution(override: Any) -> BaseDistribution:
    """Raises ValueError for what Optuna can't draw from, such as an interval whose ends are in the wrong order.

    Values of a list are in no order, numbers neither; those of intervals and of `range` of whole numbers are.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if override.is_interval_sweep():
        kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    if override.is_range_sweep() and not value.shuffle and isinstance(steps := value.range(), range) and steps:
        return IntDistribution(min(steps), max(steps), step=abs(steps.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))
