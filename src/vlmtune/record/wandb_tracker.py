"""Weights & Biases. The only module that imports wandb."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmtune.errors import ConfigError, nearest
from vlmtune.record import runfolder
from vlmtune.record.samples import IMAGE_SIDE, Sample, thumbnail

log = logging.getLogger(__name__)


WANDB_MODES = {"online", "offline", "disabled", "shared", "dryrun", "run"}


WANDB_START_SECONDS = 30  # that a start waits for the server


WANDB_FINISH_SECONDS = 600  # that the end waits for an upload


WANDB_CALL_SECONDS = 60  # that W&B's service process gets to take a call, an upload not counted


class WandB:
    """Weights & Biases. Everything it writes, the images waiting for an upload too, lies in `folder`/wandb.

    Its variables (WANDB_PROJECT, WANDB_DIR, WANDB_RUN_GROUP, WANDB_NAME and all others) win over the defaults here,
    and lose to a key that the user sets. A resumed run keeps the id of the first start, which is kept in
    `folder`/wandb/run_id.
    """

    def __init__(self, project: str | None, mode: str, config: dict[str, Any], folder: Path, resumed: bool = False):
        if mode not in WANDB_MODES:
            raise ConfigError(f"WANDB_MODE={mode}: {nearest(mode, WANDB_MODES)}")
        import wandb

        self.wandb = wandb
        self.data_folder = Path(os.environ.get("WANDB_DIR") or folder) / "wandb"
        place = folder.resolve().parts[-3:]  # sweeps/<name>/<stamp>/<trial>: the trials of one sweep make a group
        earlier = folder / "wandb" / "run_id"
        kept: dict[str, Any] = {"id": earlier.read_text(), "resume": "allow"} if resumed and earlier.exists() else {}
        try:
            self.run = wandb.init(
                project=project or os.environ.get("WANDB_PROJECT") or "vlmtune",
                mode=mode,  # type: ignore[arg-type]  # checked above
                config=config,
                dir=os.environ.get("WANDB_DIR") or folder,
                group=os.environ.get("WANDB_RUN_GROUP") or "/".join(place[:-1]),
                name=os.environ.get("WANDB_NAME") or "/".join(place),
                settings=_wandb_settings(wandb),
                **kept,
            )
        except Exception as error:
            raise ConfigError(
                f"tracker=wandb: W&B did not start (mode {mode}): {error}. Use tracker.mode=offline and upload later "
                "with `wandb sync`, or `wandb login` and a network, or tracker=none"
            ) from error
        earlier.parent.mkdir(parents=True, exist_ok=True)
        runfolder.write_whole(earlier, self.run.id)  # W&B refuses an empty id
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        upload = f"offline; upload with `wandb sync {Path(self.run.dir).parent}`"
        log.info("W&B: %s", upload if self.run.offline else self.run.url)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """W&B's own step is ours: a resumed run's rows follow those before it, and rows done twice count once."""
        self._call(lambda: self.run.log({**values, "step": step}, step=step), WANDB_CALL_SECONDS)

    def samples(self, rows: list[Sample], step: int) -> None:
        table = self.wandb.Table(columns=["image", "question", "reference", "prediction", "score"])
        for row in rows:
            image = row.image and self.wandb.Image(thumbnail(row.image, IMAGE_SIDE))
            table.add_data(image, row.question, row.reference, row.prediction, row.score)
        with _environment("WANDB_DATA_DIR", str(self.data_folder)):
            self._call(lambda: self.run.log({"samples": table, "step": step}, step=step), WANDB_CALL_SECONDS)

    def finish(self, summary: Mapping[str, Any]) -> None:
        result = dict(summary)
        metrics = result.pop("metrics", {})  # beside the curves of the same names, as W&B's tables show them
        code = 0 if summary.get("status", "completed") == "completed" else 1
        upload = self.run.settings.finish_timeout or None  # 0: without end

        def finish() -> None:
            self.run.summary.update(result | metrics)
            self.run.finish(exit_code=code)

        self._call(finish, upload and upload + WANDB_CALL_SECONDS)

    def _call(self, call: Callable[[], None], seconds: float | None) -> None:
        """Make a call of W&B. Raises `Hangs` if it takes longer than `seconds`: W&B itself would wait without end for a
        service process that hangs, here and when Python ends.
        """
        try:
            _within(seconds, call)
        except (Hangs, ConnectionError):
            with suppress(Exception):
                _within(1, self.wandb.teardown)  # so that nothing waits for the process when Python ends
            raise


class Hangs(Exception):
    """W&B's service process does not answer."""


def _within(seconds: float | None, call: Callable[[], None]) -> None:
    """Call in a thread; raises what it raises, and `Hangs` if it takes longer than `seconds`."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hangs(f"no answer within {seconds:.0f} s")
    for failure in failures:
        raise failure


def _wandb_settings(wandb: Any) -> Any:
    """Quiet, bounded in time, and no copy of code, git state, command line or SLURM's environment: environment.json has
    what matters. A WANDB_ variable wins over each of them.
    """
    defaults = {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "x_disable_meta": True,
        "init_timeout": WANDB_START_SECONDS,
        "finish_timeout": WANDB_FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    ours = {name: value for name, value in defaults.items() if f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(reinit="create_new", **ours)


@contextmanager
def _environment(name: str, default: str) -> Iterator[None]:
    """Set an environment variable for a while, unless it is set. W&B stages a table's images in WANDB_DATA_DIR, and can
    be told so in no other way; by default an offline run's images would lie in the home directory."""
    before = os.environ.get(name)
    os.environ[name] = before or default
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
