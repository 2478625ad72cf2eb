"""The scripts in `src/`: Hydra apps that answer a mistake in one piece, and end with an exit code that says how it went."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune import api, compose
from vlmtune.config import home
from vlmtune.errors import ConfigError, VlmtuneError

LOOKING = (
    "-h",
    "--help",
    "--hydra-help",
    "-c",
    "--cfg",
    "-i",
    "--info",
    "--version",
    "--resolve",
    "-sc",
    "--shell-completion",
)
MULTIRUN = ("-m", "--multirun")


def main(command: str, job: Callable[[Any], int]) -> None:
    """Run the Hydra app `conf/<command>.yaml`. `job` takes the composed config and returns an exit code."""
    import hydra

    codes: list[int] = []

    def guarded(composed: Any) -> None:
        codes.append(guard(lambda: job(composed)))

    overrides = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not any(word.split("=")[0] in LOOKING for word in sys.argv[1:]):
        code = guard(lambda: check(command, overrides))
        if code:
            sys.exit(code)
        if int(os.environ.get("RANK", 0)) != 0:  # the first rank makes the run folder; the others join it
            sys.exit(guard(lambda: job(compose.compose(command, compose.normalise(overrides)[0]))))
        flags = [word for word in sys.argv[1:] if word.startswith("-")]
        sys.argv[1:] = [*flags, *compose.normalise(overrides)[0], *folder_of_resumed(overrides)]
    hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name=command)(guarded)()
    sys.exit(max(codes, default=0))


def check(command: str, overrides: list[str]) -> int:
    """Find every problem of the command line before anything is written."""
    if any(flag in sys.argv for flag in MULTIRUN) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "-m under a launcher would give each process other parameters. Run the sweep on one process: "
            f"python {sys.argv[0]} -m {' '.join(overrides)}"
        )
    if command != "train":
        compose.overlay(compose.compose(command, compose.normalise(overrides)[0]), overrides)
        return 0
    config, composed = compose.read(command, overrides)
    if not any(flag in sys.argv for flag in MULTIRUN):
        api.check_free(Path(composed.hydra.run.dir), config)
    return 0


def folder_of_resumed(overrides: list[str]) -> list[str]:
    """The Hydra override that makes a resumed run go on in its own folder."""
    found = [word.split("=", 1)[1] for word in overrides if word.lstrip("+").startswith("resume=")]
    return [f"hydra.run.dir={found[-1]}", "hydra.output_subdir=null"] if found and found[-1] != "null" else []


def guard(job: Callable[[], int]) -> int:
    """Run `job`; a user's mistake is printed in one piece, without a traceback unless VLMTUNE_TRACEBACK is set."""
    try:
        return job()
    except VlmtuneError as error:
        if os.environ.get("VLMTUNE_TRACEBACK"):
            traceback.print_exc()
        print(message(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def message(error: VlmtuneError) -> str:
    """`error: ...`, or a list of problems."""
    kind = {"ConfigError": "config", "DataError": "data", "BadRowsError": "data"}.get(type(error).__name__)
    label = f"{kind} error" if kind else "error"
    if len(error.problems) == 1:
        return f"{label}: {error.problems[0]}"
    return "\n".join([f"{label}: {len(error.problems)} problems", *(f"  - {problem}" for problem in error.problems)])


def train(composed: Any) -> int:
    """The job of train.py."""
    from hydra.core.hydra_config import HydraConfig

    from vlmtune.config import strict

    words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else compose.normalise(sys.argv[1:])[0]
    config = strict(compose.saved_config(composed.resume, words) if composed.get("resume") else composed)
    folder = Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path()
    status = api.run_in(folder, config)["status"]
    return 130 if status == "interrupted" else 0


def predict(composed: Any) -> int:
    """The job of predict.py."""
    config = compose.overlay(composed, sys.argv[1:])
    failed = api.predict_file(composed.run, config, composed.output)
    print(f"wrote {composed.output}" + (f"; {failed} rows failed, see its column `error`" if failed else ""))
    return 0


def evaluate(composed: Any) -> int:
    """The job of evaluate.py."""
    config = compose.overlay(composed, sys.argv[1:])
    print(api.evaluate_run(composed.run, config, composed.output))
    return 0
