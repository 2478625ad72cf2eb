"""All ranks must do the same: the config, the rows and the code of each are compared before anything is computed.

Ranks that differ would not fail: they would average the gradients of different runs, or wait for each other for hours.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.commands import PACKAGE
from vlmtune.config.schema import Config
from vlmtune.data.splits import Split
from vlmtune.errors import ConfigError, DataError
from vlmtune.launch import session
from vlmtune.launch.engine import Engine
from vlmtune.record import environment
from vlmtune.training import resume

PLACES = ("data.train", "data.validation", "data.test", "data.image_root", "data.cache_folder", "model.path")
"""Keys that may differ: each machine may keep its files elsewhere, and their content is compared."""
ROWS, SHOWN = "rows of ", 8
"""How the name of a split's rows begins, and the most differences that an error shows."""


def agree(folder: Path | None, config: Config, splits: Mapping[str, Split], engine: Engine) -> Path:
    """The first rank's run folder, and what it found there, on every rank (`session.agree_on_folder`).

    Raises ConfigError or DataError, the same on every rank, if config, rows or code differ between them.
    """
    agreed = session.agree_on_folder(folder, config, engine)
    if engine.num_processes > 1:
        compare(facts(config, splits), engine)
    return agreed


def facts(config: Config, splits: Mapping[str, Split]) -> dict[str, Any]:
    """What must be equal on every rank, by a name for each."""
    own = {key: value for key, value in resume.values(config).items() if key not in PLACES}
    versions = {f"package {name}": version for name, version in environment.versions().items()}
    code = {f"vlmtune/{file.relative_to(PACKAGE)}": _hash(file.read_bytes()) for file in sorted(PACKAGE.rglob("*.py"))}
    rows = {f"{ROWS}{name}": f"{split.records.fingerprint()} (fingerprint)" for name, split in splits.items()}
    return {**own, **rows, **versions, **code}


def compare(own: Mapping[str, Any], engine: Engine) -> None:
    """Raise the same error on every rank if `own` is not equal on all, with the values of each. Every rank calls it."""
    from accelerate.utils import gather_object

    if engine.num_processes == 1:
        return
    mine = {name: str(value) for name, value in own.items()}
    found: list[tuple[str, dict[str, str]]] = gather_object([(socket.gethostname(), mine)])
    names = list(dict.fromkeys(name for _, values in found for name in values))
    differing = [name for name in names if len({values.get(name) for _, values in found}) > 1]
    if not differing:
        return
    problems = [_problem(name, found) for name in differing[:SHOWN]]
    if (more := len(differing) - SHOWN) > 0:
        problems.append(f"{more} more differences")
    problems[-1] += ". Start all ranks with the same command, rows and code"
    raise (DataError if all(name.startswith(ROWS) for name in differing) else ConfigError)(problems)


def _problem(name: str, found: list[tuple[str, dict[str, str]]]) -> str:
    """`NAME: rank 0 has A, ranks 1, 2 and 3 on node2 have B`."""
    several = len({host for host, _ in found}) > 1
    by_value: dict[str, list[str]] = {}
    for rank, (host, values) in enumerate(found):
        by_value.setdefault(values.get(name, "nothing"), []).append(f"{rank} ({host})" if several else f"{rank}")
    said = [
        f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:SHOWN])}{', ...' * (len(ranks) > SHOWN)} "
        f"{'have' if len(ranks) > 1 else 'has'} {value}"
        for value, ranks in by_value.items()
    ]
    return f"{name}: {'; '.join(said)}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
