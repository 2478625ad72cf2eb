"""Where a run's numbers go: always metrics.jsonl, and beside it Weights & Biases, TensorBoard or nothing.

The only module that imports wandb, and only once a run asks for it. A tracker that can't start is an error that says
what to do; one that fails later costs a warning and its own data, never the training.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmtune.errors import ConfigError, nearest, to_install

if TYPE_CHECKING:
    from PIL import Image

    from vlmtune.config.schema import TrackerConfig

log = logging.getLogger(__name__)

IMAGE_SIDE = 512  # pixels; larger images are scaled down before they are logged
WANDB_MODES = {"online", "offline", "disabled", "shared", "dryrun", "run"}
WANDB_START_SECONDS = 30  # that a start waits for the server
WANDB_FINISH_SECONDS = 600  # that the end waits for an upload


@dataclass(frozen=True)
class Sample:
    """One evaluated row, to look at."""

    question: str
    reference: str
    prediction: str
    score: float
    """0 (wrong) to 1 (right)."""
    image: Image.Image | None = None


class Tracker(Protocol):
    """A place that curves and samples go to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; `step` counts optimizer steps and is the x axis."""

    def samples(self, rows: list[Sample], step: int) -> None:
        """Add a table of answers with their images."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final result (that of result.json) and close. Nothing may follow."""


class NoTracker:
    """tracker=none."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def samples(self, rows: list[Sample], step: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object per call, on disk when the call returns; NaN and infinities are null."""

    def __init__(self, path: Path, resume_step: int | None = None):
        """Start an empty file, or continue one from a checkpoint: lines after `resume_step` are cut."""
        self.path = path
        last = -1 if resume_step is None else resume_step
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= last]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)

    def log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order, none if there is no file; a half-written last line is ignored.

    Lines that are no object with a step are left out, with a warning.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows, strange = [], []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            strange.append(number)
    if strange:
        log.warning("%s: left out %d lines that can't be read, the first is line %d", path, len(strange), strange[0])
    return rows


def check(config: TrackerConfig) -> None:
    """Raise ConfigError where the tracker's package is missing, before time is spent."""
    if config.name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"tracker=tensorboard needs the package tensorboard: {to_install('tensorboard')}, or use tracker=none"
        )


def build(config: TrackerConfig, run_config: Mapping[str, Any], folder: Path, *, resumed: bool = False) -> Tracker:
    """Open the tracker that `config` names, for the run in `folder`, and store `run_config` there without its secrets.

    On one process of a run only. `resumed`: continue the run that the folder's earlier process opened. Raises
    ConfigError when it can't start: unknown WANDB_MODE, no login, no network.
    """
    mode = config.mode or os.environ.get("WANDB_MODE") or "offline"
    if config.name == "none" or (config.name == "wandb" and mode == "disabled"):
        return NoTracker()
    folder.mkdir(parents=True, exist_ok=True)
    public = without_secrets(run_config)
    if config.name == "tensorboard":
        return Surviving("TensorBoard", TensorBoard(public, folder))
    return Surviving("W&B", WandB(config.project, mode, public, folder, resumed))


class Surviving:
    """A tracker whose first failure is a warning, after which it gets nothing more."""

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._warning():
            self.tracker.log(values, step)

    def samples(self, rows: list[Sample], step: int) -> None:
        with self._warning():
            self.tracker.samples(rows, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        with self._warning():
            self.tracker.finish(summary)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            log.warning(
                "%s failed and is off for the rest of this run; metrics.jsonl is still written: %s", self.name, error
            )
            self.tracker = NoTracker()


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
        earlier.write_text(self.run.id)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        upload = f"offline; upload with `wandb sync {Path(self.run.dir).parent}`"
        log.info("W&B: %s", upload if self.run.offline else self.run.url)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """W&B's own step is ours: a resumed run's rows follow those before it, and rows done twice count once."""
        self.run.log({**values, "step": step}, step=step)

    def samples(self, rows: list[Sample], step: int) -> None:
        table = self.wandb.Table(columns=["image", "question", "reference", "prediction", "score"])
        for row in rows:
            image = row.image and self.wandb.Image(thumbnail(row.image, IMAGE_SIDE))
            table.add_data(image, row.question, row.reference, row.prediction, row.score)
        with _environment("WANDB_DATA_DIR", str(self.data_folder)):
            self.run.log({"samples": table, "step": step}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        result = dict(summary)
        metrics = result.pop("metrics", {})  # beside the curves of the same names, as W&B's tables show them
        self.run.summary.update(result | metrics)
        self.run.finish(exit_code=0 if summary.get("status", "completed") == "completed" else 1)


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


class TensorBoard:
    """TensorBoard's event files in `folder`/tensorboard."""

    def __init__(self, config: dict[str, Any], folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self._text("config", config, 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, rows: list[Sample], step: int) -> None:
        import numpy as np

        for number, row in enumerate(rows):
            if row.image:
                pixels = np.asarray(thumbnail(row.image, IMAGE_SIDE))
                self.writer.add_image(f"samples/{number}", pixels, step, dataformats="HWC")
            shown = {name: value for name, value in vars(row).items() if name != "image"}
            self._text(f"samples/{number}", shown, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._text("result", summary, 0)
        self.writer.close()

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        """Add JSON as a block of code: Markdown indents it by four spaces."""
        block = "".join(f"    {line}\n" for line in json.dumps(values, indent=2, default=str).splitlines())
        self.writer.add_text(name, block, step)


def without_secrets(values: Any) -> Any:
    """Copy nested configuration, leaving out what may be a credential.

    A name with `secret` or `password` in it goes; one with `token` or `key` goes unless it holds a number, as
    `max_new_tokens` does.
    """
    if isinstance(values, Mapping):
        return {name: without_secrets(value) for name, value in values.items() if not _is_secret(str(name), value)}
    return [without_secrets(value) for value in values] if isinstance(values, list | tuple) else values


def _is_secret(name: str, value: Any) -> bool:
    suspicious = (
        ("secret", "password") if isinstance(value, int | float | None) else ("secret", "password", "token", "key")
    )
    return any(word in name.lower() for word in suspicious)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """An RGB copy whose longer side is at most `side` pixels."""
    copy = image.convert("RGB")
    copy.thumbnail((side, side))
    return copy
