"""Weights & Biases. The only module that imports wandb."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmtune.errors import ConfigError, nearest
from vlmtune.launch.surroundings import SERVICE
from vlmtune.record import place, runfolder
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

    def __init__(
        self,
        project: str | None,
        mode: str,
        config: dict[str, Any],
        folder: Path,
        resumed: bool = False,
        placed: dict[str, Any] | None = None,
    ):
        """`placed`: as `place.of`, which finds it otherwise."""
        if mode not in WANDB_MODES:
            raise ConfigError(f"WANDB_MODE={mode}: {nearest(mode, WANDB_MODES)}")
        import wandb

        _keep_to_own_service()
        self.wandb = wandb
        self.data_folder = Path(os.environ.get("WANDB_DIR") or folder) / "wandb"
        earlier = folder / "wandb" / "run_id"
        kept: dict[str, Any] = {"id": earlier.read_text(), "resume": "allow"} if resumed and earlier.exists() else {}
        try:
            self.run = wandb.init(
                project=project or os.environ.get("WANDB_PROJECT") or "vlmtune",
                mode=mode,  # type: ignore[arg-type]  # checked above
                config=config,
                dir=os.environ.get("WANDB_DIR") or folder,
                **_placed(placed or place.of(folder, config)),
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


def summary(sweep: Path, rows: Sequence[Mapping[str, Any]], metric: str, project: str | None, mode: str) -> None:
    """Add a run to the sweep's group that shows it as a whole: its table, a plot of the metric for each swept key, and
    compare.html.

    `rows`: of summary.csv; `metric`: the column that the trials are compared by. Raises ConfigError, `Hangs`, and what
    W&B raises.
    """
    group = place.group(sweep)
    own = {"group": group, "name": f"{group} (all trials)", "job_type": "sweep", "tags": [sweep.resolve().parts[-2]]}
    tracker = WandB(project, mode, {"metric": metric}, sweep, resumed=True, placed=own)  # if it was shown before
    wandb = tracker.wandb
    columns = list(rows[0]) if rows else []
    table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
    shown: dict[str, Any] = {"trials": table}
    swept = columns[1 : columns.index("overrides")] if rows else []  # as trials.summary puts them
    for key in swept if metric in columns else []:
        pairs = [[_number(row[key]), row[metric]] for row in rows if row[metric] is not None]
        points = wandb.Table(columns=[key, metric], data=pairs)
        shown[f"{metric} by {key}"] = wandb.plot.scatter(points, key, metric, title=f"{metric} by {key}")
    if (sweep / "compare.html").is_file():
        shown["compare"] = wandb.Html(str(sweep / "compare.html"), inject=False)
    with _environment("WANDB_DATA_DIR", str(tracker.data_folder)):
        tracker._call(lambda: tracker.run.log(shown), WANDB_CALL_SECONDS)
    tracker.finish({})


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


def _keep_to_own_service() -> None:
    """Let W&B begin a service of this process where the variable names that of another one, which started it.

    With that one, the id of a run that is killed stays in use, and no start can resume it. W&B's agent does the same.
    """
    if f"-{os.getpid()}-" not in os.environ.get(SERVICE, ""):
        os.environ.pop(SERVICE, None)


def _placed(known: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `wandb.init`; a variable wins, also one that was set after W&B was first used in this process."""
    variables = {"group": "WANDB_RUN_GROUP", "name": "WANDB_NAME", "job_type": "WANDB_JOB_TYPE", "tags": "WANDB_TAGS"}
    given = {name: value for name, variable in variables.items() if (value := os.environ.get(variable))}
    tags = {"tags": given["tags"].split(",")} if "tags" in given else {}
    return known | given | tags


def _number(text: Any) -> Any:
    """A swept value as a number, where it is one."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return str(text)


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
