from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import wandb_offline
from grids import thinned
from vlmtune.config.schema import TrackerConfig
from vlmtune.errors import ConfigError
from vlmtune.record import tracking, wandb_tracker
from vlmtune.record.metrics_file import MetricsFile, read_metrics
from vlmtune.record.samples import Sample
from vlmtune.record.tracking import NoTracker, Surviving, build, without_secrets

CONFIG = {
    "adapter": {"method": "LORA", "r": 16},
    "generation": {"max_new_tokens": 256},
    "model": {"hub_token": "hf_abc", "parts": [{"api_key": "k", "name": "vision"}]},
    "db_password": 1234,
}
SAMPLES = [
    Sample("what colour?", "red", "red", 1.0, Image.new("RGB", (900, 300), "red")),
    Sample("what shape?", "circle", "square", 0.0, Image.new("L", (8, 8))),
    Sample("no image", "yes", "no", 0.0),
]
RESULT = {"status": "completed", "objective": 0.5, "metrics": {"eval/exact_match": 0.5}, "error": None}


@pytest.fixture(autouse=True)
def no_outer_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def drive(config: TrackerConfig, folder: Path) -> None:
    tracker = build(config, CONFIG, folder)
    for step in (10, 20):
        tracker.log({"train/loss": 1 / step, "train/learning_rate": 1e-4}, step)
    tracker.log({"eval/exact_match": 0.5, "eval/loss": math.nan}, 20)
    tracker.samples(SAMPLES, 20)
    tracker.finish(RESULT)


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb") / "rank" / "stamp" / "0"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        drive(TrackerConfig(name="wandb", project="p"), folder)
        assert "WANDB_DATA_DIR" not in os.environ
    return folder


def test_wandb_offline_has_every_curve_against_the_optimizer_step(wandb_run: Path) -> None:
    run = wandb_offline.read(wandb_run)
    losses = [(row["step"], row["train/loss"]) for row in run["history"] if "train/loss" in row]
    assert losses == [(10, 0.1), (20, 0.05)]
    assert [row["step"] for row in run["history"] if row.get("eval/exact_match") == 0.5] == [20]
    assert ("*", "step") in run["metrics"]
    assert run["summary"]["eval/exact_match"] == 0.5
    assert run["exit_code"] == 0


def test_wandb_offline_has_the_config_and_no_secret(wandb_run: Path) -> None:
    config = wandb_offline.read(wandb_run)["config"]
    assert config["adapter"] == {"method": "LORA", "r": 16}
    assert config["generation"] == {"max_new_tokens": 256}
    text = b"".join(path.read_bytes() for path in wandb_run.rglob("*") if path.is_file())
    assert b"hf_abc" not in text
    assert b"1234" not in json.dumps(config).encode()


def test_wandb_offline_has_the_sample_table_with_pictures_inside_the_run_folder(wandb_run: Path) -> None:
    run = wandb_offline.read(wandb_run)
    (table,) = [path for path in run["files"] if path.endswith("table.json")]
    (stored,) = wandb_run.rglob(table)
    rows = json.loads(stored.read_text())
    assert rows["columns"] == ["image", "question", "reference", "prediction", "score"]
    assert [row[1:] for row in rows["data"]] == [[s.question, s.reference, s.prediction, s.score] for s in SAMPLES]
    assert len(run["images"]) == 2
    assert all(path.is_relative_to(wandb_run.resolve()) for path in run["images"].values())
    pictures = [Image.open(BytesIO(path.read_bytes())) for path in run["images"].values()]
    assert sorted(picture.size for picture in pictures) == [(8, 8), (512, 171)]


@pytest.mark.slow
def test_a_resumed_run_goes_on_under_its_id_in_one_curve(tmp_path: Path) -> None:
    """Resumed from step 2 after it came to step 3, which is logged twice."""
    for resumed, steps in ((False, (1, 2, 3)), (True, (3, 4))):
        tracker = build(TrackerConfig(name="wandb", project="p"), CONFIG, tmp_path, resumed=resumed)
        for step in steps:
            tracker.log({"train/loss": 1 / step}, step)
        tracker.finish(RESULT)
    parts = [wandb_offline.read(log) for log in sorted(tmp_path.rglob("offline-run-*"))]
    assert len(parts) == 2
    assert parts[0]["id"] == parts[1]["id"] != ""
    rows = [(row["_step"], row["step"], row["train/loss"]) for part in parts for row in part["history"]]
    assert rows == [(step, step, 1 / step) for step in (1, 2, 3, 3, 4)], "W&B counts a step once"


def test_a_kill_while_the_id_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(TrackerConfig(), {}, tmp_path).finish(RESULT)
    file = tmp_path / "wandb" / "run_id"
    before = file.read_text()

    def killed(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build(TrackerConfig(), {}, tmp_path)
    assert file.read_text() == before != ""


STARTS_ANOTHER = """
import os, signal, subprocess, sys
from pathlib import Path
from vlmtune.record.wandb_tracker import WandB
folder, *hows = sys.argv[1:]
tracker = WandB(None, "offline", {}, Path(folder), resumed=True)
if hows == ["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
for how in hows:
    assert "WANDB_SERVICE" in os.environ
    given = [how] if how == "killed" else []
    print(subprocess.run([sys.executable, __file__, str(Path(folder, "run")), *given]).returncode)
tracker.finish({})
"""


def test_a_killed_run_resumes_though_the_process_that_started_it_uses_wandb(tmp_path: Path) -> None:
    """As from a notebook, or a sweep: with the service of that process, the run's id would stay in use."""
    program, outer = tmp_path / "starts_another.py", tmp_path / "outer"
    program.write_text(STARTS_ANOTHER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(outer), "killed", "goes on"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == [str(-signal.SIGKILL), "0"], ended.stderr
    assert len({log.stem for log in (outer / "run").rglob("run-*.wandb")}) == 1


def test_an_empty_data_folder_of_wandb_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a later run of this process would leave its pictures in the folder of this one."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    with wandb_tracker._environment("WANDB_DATA_DIR", "here"):
        assert os.environ["WANDB_DATA_DIR"] == "here"
    assert os.environ["WANDB_DATA_DIR"] == ""


def test_wandb_marks_a_failed_run(tmp_path: Path) -> None:
    build(TrackerConfig(), {}, tmp_path).finish({"status": "failed"})
    assert wandb_offline.read(tmp_path)["exit_code"] == 1


def test_wandb_mode_of_the_environment_wins_over_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(build(TrackerConfig(), {}, tmp_path), NoTracker)
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="did you mean offline"):
        build(TrackerConfig(), {}, tmp_path)


def test_online_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"tracker\.mode=offline.*wandb login"):
        build(TrackerConfig(mode="online"), {}, tmp_path)


def test_a_failing_tracker_warns_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(NoTracker):
        def log(self, values: object, step: int) -> None:
            raise OSError("disk full")

    tracker = Surviving("W&B", Broken())
    with caplog.at_level(logging.WARNING):
        tracker.log({"train/loss": 1.0}, 1)
        tracker.log({"train/loss": 1.0}, 2)
        tracker.finish({})
    assert [record.getMessage() for record in caplog.records if "disk full" in record.getMessage()]
    assert len(caplog.records) == 1


LOST_SERVICE = """
import os, signal, sys, psutil
from pathlib import Path
from vlmtune import display
from vlmtune.config.schema import TrackerConfig
from vlmtune.record import tracking, wandb_tracker
wandb_tracker.WANDB_CALL_SECONDS = wandb_tracker.WANDB_FINISH_SECONDS = 1
with display.logging_to(Path(sys.argv[1])):
    tracker = tracking.build(TrackerConfig(), {}, Path(sys.argv[1]))
    tracker.log({"train/loss": 1.0}, 1)
    service = psutil.Process().children(recursive=True)
    print(*[process.pid for process in service], flush=True)
    for process in service:
        process.send_signal(int(sys.argv[2]))
    for step in range(2, 30):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish({"status": "completed"})
"""


@pytest.mark.parametrize("number", thinned([signal.SIGKILL, signal.SIGSTOP], 1))
def test_a_service_of_wandb_that_dies_or_hangs_costs_one_warning(tmp_path: Path, number: signal.Signals) -> None:
    """The process neither fails nor waits, not at its end either."""
    said, errors = tmp_path / "said", tmp_path / "errors"
    with said.open("w") as out, errors.open("w") as err:  # not pipes: a service that hangs would hold them open
        done = subprocess.run(
            [sys.executable, "-c", LOST_SERVICE, str(tmp_path), str(int(number))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=out,
            stderr=err,
            timeout=120,
            check=False,
        )
    for pid in said.read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    assert said.read_text().split(), "there was a service"
    assert done.returncode == 0
    assert errors.read_text().count("W&B failed and is off for the rest of this run") == 1
    assert "Traceback" not in errors.read_text()


@pytest.mark.parametrize("name", thinned(["none", "tensorboard"], 1))
def test_other_trackers_never_import_wandb(name: str, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from vlmtune.config.schema import TrackerConfig
from vlmtune.record.tracking import build
tracker = build(TrackerConfig(name={name!r}), {{}}, Path({str(tmp_path)!r}))
tracker.log({{'train/loss': 1.0}}, 1)
tracker.samples([], 1)
tracker.finish({{}})
assert 'wandb' not in sys.modules
"""
    source = str(Path(tracking.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})


def test_tensorboard_has_curves_images_and_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    drive(TrackerConfig(name="tensorboard"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, round(event.value, 6)) for event in events.Scalars("train/loss")]
    assert losses == [(10, 0.1), (20, 0.05)]
    assert events.Images("samples/0")[0].width == 512
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"method": "LORA"' in config
    assert "hf_abc" not in config


def test_metrics_file_is_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"train/loss": math.nan, "train/learning_rate": math.inf}, 1)
    file.log({"train/loss": 0.5}, 2)
    assert read_metrics(file.path) == [
        {"step": 1, "train/loss": None, "train/learning_rate": None},
        {"step": 2, "train/loss": 0.5},
    ]


def test_resume_cuts_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    """A killed run has logged past its checkpoint and may have died inside a line."""
    path = tmp_path / "metrics.jsonl"
    before = MetricsFile(path)
    for step in (1, 2, 3):
        before.log({"train/loss": step / 10}, step)
    with path.open("a") as torn:
        torn.write('{"step": 4, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, resume_step=2).log({"train/loss": 9.0}, 3)
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]


def test_a_new_run_does_not_go_on_with_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).log({"train/loss": 1.0}, 1)
    assert read_metrics(MetricsFile(path).path) == []


def test_secrets_go_and_token_counts_stay() -> None:
    assert without_secrets(CONFIG) == {
        "adapter": {"method": "LORA", "r": 16},
        "generation": {"max_new_tokens": 256},
        "model": {"parts": [{"name": "vision"}]},
    }
