"""The scripts in `src/`: Hydra apps that answer a mistake in one piece and end with an exit code that says how it went.

0: done; 1: failed; 2: the command line can't be read; 128 + n: ended by signal n (130 by Ctrl-C).
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmtune import api
from vlmtune.config import compose, paths
from vlmtune.config.schema import home
from vlmtune.errors import ConfigError, DataError, StorageError, UsageError, VlmtuneError, memory_advice, storage_advice
from vlmtune.launch.signals import Interrupted


def main(command: str, job: Callable[[Any], int]) -> None:
    """Run the Hydra app `conf/<command>.yaml`. `job` takes the composed config and returns an exit code."""
    codes: list[int] = []

    def guarded(composed: Any) -> None:
        codes.append(guard(lambda: job(composed)))
        if codes[-1] >= 128:  # a signal is for the whole sweep
            leave(codes[-1])

    code = guard(lambda: prepare(command))
    if code:
        leave(code)
    if int(os.environ.get("RANK", 0)) != 0:  # the first rank makes the run folder; the others join it
        leave(guard(lambda: job(compose.compose(command, overrides_given()))))
    code = guard(lambda: with_hydra(command, guarded))
    leave(max([code, *codes]))


def with_hydra(command: str, job: Callable[[Any], None]) -> int:
    """Let Hydra run `job`, once or over a sweep. Raises ConfigError, and what Hydra's own work raises."""
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # or it would answer a folder that can't be made with a traceback
    try:
        hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name=command)(job)()
    except HydraException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    return 0


def leave(code: int) -> None:
    """End the process; beside other ranks without the libraries' own endings.

    Threads behind a process group (gloo, torch 2.13) abort one in twenty ranks at that point, whose work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # nobody reads any more; Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def say(text: object, stream: Any = None) -> None:
    """Print to whoever still reads."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def prepare(command: str) -> int:
    """Check the command line before anything is written, and leave it in `sys.argv` as Hydra takes it."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("the working folder no longer exists; change into one that does") from None
    words = flags_and_overrides()
    if words.hydra_help or words.shell_completion:
        return 0
    usable, problems = compose.normalise(words.overrides)
    looks_only = words.help or words.cfg or words.info
    if not looks_only:
        check(command, words.overrides, multirun=words.multirun)
    elif problems:
        raise ConfigError(problems)
    flags = [word for word in sys.argv[1:] if word not in words.overrides]
    sys.argv[1:] = [*flags, *usable, *folder_of_resumed(words.overrides)]
    return 0


def flags_and_overrides() -> Any:
    """The command line as Hydra's own parser reads it. Raises UsageError for flags that don't apply here."""
    from hydra._internal.utils import get_args_parser

    words, unknown = get_args_parser().parse_known_intermixed_args()
    problems = [
        f"{flag}: no such flag (--hydra-help lists them); keys go without dashes: key=value" for flag in unknown
    ]
    if words.config_name or words.config_path or words.config_dir:
        problems.append(
            "--config-name, --config-path, --config-dir: a script has one config; set keys of it: key=value"
        )
    if problems:
        raise UsageError(problems)
    return words


def overrides_given() -> list[str]:
    """The `key=value` words of this process's command line, or of the multirun job that it is in."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        return list(HydraConfig.get().overrides.task)
    return list(flags_and_overrides().overrides)


def check(command: str, overrides: list[str], *, multirun: bool) -> None:
    """Raise VlmtuneError with every problem that can be found without opening data or model."""
    if multirun and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "-m under a launcher would give each process other parameters. Run the sweep on one process: "
            f"python {sys.argv[0]} -m {shlex.join(overrides)}"
        )
    if command != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"{command}.py works in one process; start it without a launcher")
    if multirun and os.environ.get("WANDB_RUN_ID"):
        raise ConfigError(
            "WANDB_RUN_ID: would make one run of all trials of a sweep; unset it (WANDB_RUN_GROUP is theirs)"
        )
    if command != "train":
        compose.overlay(compose.compose(command, compose.normalise(overrides)[0]), overrides)
        return
    config, composed = compose.read(command, overrides, multirun=multirun)
    if int(os.environ.get("RANK", 0)) == 0:
        paths.check_writable(Path(composed.hydra.sweep.dir if multirun else config.resume or composed.hydra.run.dir))
    if not multirun and int(os.environ.get("RANK", 0)) == 0:
        api.check_free(Path(composed.hydra.run.dir), config)
    elif swept := composed.hydra.sweeper.get("params"):
        compose.read(command, [*(f"{key}={values}" for key, values in swept.items()), *overrides], multirun=True)


def folder_of_resumed(overrides: list[str]) -> list[str]:
    """The Hydra override that makes a resumed run go on in its own folder."""
    typed = [o for o in compose.parse(overrides) if o.key_or_group == "resume" and not o.is_sweep_override()]
    found = [override.value() for override in typed]
    return [f"hydra.run.dir={paths.quoted(str(found[-1]))}", "hydra.output_subdir=null"] if found and found[-1] else []


def guard(job: Callable[[], int]) -> int:
    """Run `job`; a user's mistake is printed in one piece, without a traceback unless VLMTUNE_TRACEBACK is set."""
    try:
        with memory_advice(), storage_advice():
            return job()
    except VlmtuneError as error:
        if os.environ.get("VLMTUNE_TRACEBACK"):
            traceback.print_exc()
        say(message(error), sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as error:
        say(error, sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def message(error: VlmtuneError) -> str:
    """`error: ...`, or a list of problems."""
    kinds = {UsageError: "usage ", ConfigError: "config ", DataError: "data "}
    label = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "") + "error"
    if len(error.problems) == 1:
        return f"{label}: {error.problems[0]}"
    return "\n".join([f"{label}: {len(error.problems)} problems", *(f"  - {problem}" for problem in error.problems)])


def train(composed: Any) -> int:
    """The job of train.py."""
    from hydra.core.hydra_config import HydraConfig

    from vlmtune.config.strict import strict

    resumed = composed.get("resume")
    config = strict(compose.saved_config(resumed, overrides_given()) if resumed else composed)
    folder = Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path()
    result = api.run_in(folder, config)
    return 128 + result["signal"] if result["status"] == "interrupted" else 0


def predict(composed: Any) -> int:
    """The job of predict.py."""
    config = compose.overlay(composed, overrides_given())
    failed = api.predict_file(composed.run, config, composed.output)
    say(f"wrote {composed.output}" + (f"; {failed} rows failed, see its column `error`" if failed else ""))
    return 0


def evaluate(composed: Any) -> int:
    """The job of evaluate.py."""
    config = compose.overlay(composed, overrides_given())
    say(api.evaluate_run(composed.run, config, composed.output))
    return 0
