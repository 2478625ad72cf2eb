"""Commands as the user typed them, for help texts and errors."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def typed(command: str) -> str:
    """`python src/train.py`, `python -m vlmtune train` or `vlmtune train`, as this process was started."""
    if _is_script():
        return f"python {shlex.quote(str(Path(sys.argv[0]).with_name(f'{command}.py')))}"
    return f"python -m vlmtune {command}" if _is_module() else f"vlmtune {command}"


def started(command: str) -> list[str]:
    """The words that start the same command as another process."""
    if _is_script():
        return [sys.executable, str(Path(sys.argv[0]).resolve().with_name(f"{command}.py"))]
    return [sys.executable, "-m", "vlmtune", command]


def import_path() -> str:
    """PYTHONPATH for other processes, so that they find this package where it is not installed."""
    return os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))


def _is_script() -> bool:
    """Whether one of this package's scripts in `src/` was started, not a user's own train.py."""
    place = Path(sys.argv[0])
    return place.suffix == ".py" and place.resolve().with_name(PACKAGE.name) == PACKAGE


def _is_module() -> bool:
    return Path(sys.argv[0]).resolve() == PACKAGE / "__main__.py"
