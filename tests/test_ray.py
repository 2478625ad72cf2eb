"""backend=ray on a real Ray of this machine: lost workers, a change of their number, a user's mistake, signals.

One Ray serves all of them. Bit by bit means: as the straight run on as many workers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

import forked
import tiny
import vlmtune
from runs import assert_same_weights
from vlmtune import backends
from vlmtune.config import compose
from vlmtune.config.schema import BackendConfig, Config, DataConfig
from vlmtune.display import Followed
from vlmtune.errors import ConfigError, DataError, LostProcess, TrainingError
from vlmtune.launch import lock, on_ray, processes, steps
from vlmtune.launch.signals import STOP_FILE, Interrupted, StopRequest
from vlmtune.launch.world import ALONE, World
from vlmtune.record import runfolder

pytestmark = pytest.mark.xdist_group("ray")

STEPS, ROWS = 8, 22
ELASTIC = [
    "backend.num_workers=[1,2]",
    "backend.resources_per_worker={CPU: 1, slot: 1}",
    "adapter.lora_dropout=0",
]
PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto."""

# ---------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["backend=ray"], r"backend\.num_workers: must be the number of workers, or the least and the most"),
        (["backend=ray", "backend.num_workers=0"], r"backend\.num_workers: must be"),
        (["backend=ray", "backend.num_workers=[4,1]"], r"backend\.num_workers: must be"),
        (["backend=ray", "backend.num_workers=[1,2,3]"], r"backend\.num_workers: must be"),
        (["backend=ray", "backend.num_workers=1", "backend.resources_per_worker={CPU: -1}"], "CPU is below 0"),
        (["backend=ray", "backend.num_processes=2"], r"backend\.num_processes=2: is for backend=accelerate"),
        (["backend=accelerate", "backend.num_workers=2"], r"backend\.num_workers=2: is for backend=ray"),
        (
            ["backend=ray", "backend.num_workers=1", "adapter=adalora"],
            "its workers resume .* AdaLoRA can't",
        ),
        (["backend.use_gpu=true"], r"backend\.use_gpu=True: is for backend=ray"),
    ],
)
def test_what_does_not_go_together(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose.read("train", words)


@pytest.mark.parametrize(("workers", "rows"), [([1, 4], 32), (2, 16)])
def test_a_range_of_workers_has_the_step_of_the_most(workers: Any, rows: int) -> None:
    """How many start is up to chance."""
    config, _ = compose.read("train", ["backend=ray", f"backend.num_workers={workers}", "trainer.batch_size=8"])
    steps.fix(config, 2)
    assert config.trainer.rows_per_step == rows


def test_a_mistake_ends_the_run_and_a_lost_process_does_not() -> None:
    mistakes = on_ray.Mistakes()
    mistakes.after_exception(None, {0: LostProcess("gone"), 1: RuntimeError("gloo")})
    with pytest.raises(DataError, match="row 3"):
        mistakes.after_exception(None, {0: LostProcess("gone"), 1: DataError("row 3")})


def test_what_ray_is_told(tmp_path: Path) -> None:
    told = BackendConfig("ray", num_workers=[1, 4], use_gpu=True, resources_per_worker={"CPU": 2}, max_failures=5)
    workers = on_ray.scaling(told)
    assert (workers.min_workers, workers.max_workers, workers.use_gpu) == (1, 4, True)
    assert workers.total_resources == {"CPU": 8, "GPU": 4}
    assert on_ray.scaling(BackendConfig("ray", num_workers=3)).total_resources == {"CPU": 3}
    failing = on_ray.run_config(told, tmp_path).failure_config
    assert (failing.max_failures, failing.max_preemption_failures) == (5, -1)
    assert (
        on_ray.run_config(BackendConfig("ray", max_preemptions=2), tmp_path).failure_config.max_preemption_failures == 2
    )
    assert on_ray.run_config(told, tmp_path).storage_path == str(tmp_path / ".ray")
    assert on_ray.run_config(BackendConfig("ray", storage="s3://bucket/x"), tmp_path).storage_path == "s3://bucket/x"
    assert on_ray.connection(told)["address"] == "local"
    assert on_ray.connection(BackendConfig("ray", address="auto"))["address"] == "auto"


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = BackendConfig("ray", num_workers=2)
    assert processes.to_start(told, ALONE) == 1
    with pytest.raises(ConfigError, match="a launcher started 4 processes"):
        processes.to_start(told, World(processes=4))
    relative = runfolder.absolute(Config(data=DataConfig(image_root="images", cache_folder="cache"))).data
    assert (relative.image_root, relative.cache_folder) == (
        str(Path("images").absolute()),
        str(Path("cache").absolute()),
    )
    with pytest.raises(ConfigError, match=r"absent: this worker's machine does not have it"):
        backends._in_worker({"folder": str(tmp_path / "absent")})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlmtune\[ray\]'"):
        processes.to_start(told, ALONE)


LINE = "2026-01-01 10:00:00,000"


def test_what_another_process_logs_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whole lines. Of an error that it went on after, one line; the last one is for the caller to show."""
    path = tmp_path / "train.log"
    path.write_text(f"{LINE} INFO earlier\n")
    log = Followed(path)
    with path.open("a") as file:
        for text in (
            f"{LINE} INFO a table\nof two lines\n{LINE} WARNING half",
            f" a line\n{LINE} ERROR lost\nfile 1\n",
        ):
            file.write(text)
            file.flush()
            log.show()
        file.write(f"{LINE} INFO resuming\n{LINE} ERROR the last\nfile 2\n")
    log.show()
    assert capsys.readouterr().err == "a table\nof two lines\nhalf a line\nlost\nresuming\n"


def test_a_signal_is_handed_on_while_a_worker_is_at_work(tmp_path: Path) -> None:
    asking, request = on_ray.Asking(tmp_path), StopRequest(tmp_path / STOP_FILE)
    with pytest.raises(Interrupted):
        asking(signal.SIGTERM, None)
    assert request.signal is None
    with lock.held(tmp_path):
        asking(signal.SIGINT, None)
        assert request.signal == signal.SIGINT
        with pytest.raises(Interrupted):
            asking(signal.SIGINT, None)


def test_a_lock_that_is_let_go_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the machine of a first rank that is gone: the next first rank waits, but not for ever."""
    with ExitStack() as held:
        held.enter_context(lock.held(tmp_path))
        monkeypatch.setattr("vlmtune.launch.lock.time.sleep", lambda seconds: held.close())
        lock.wait(tmp_path)
    monkeypatch.setattr(lock, "LEASE", 0)
    with lock.held(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        lock.wait(tmp_path)


def test_a_second_command_for_the_same_run_is_refused_while_no_worker_is_at_work(tmp_path: Path) -> None:
    """And leaves the first one's files alone."""
    config = Config(backend=BackendConfig("ray", num_workers=1))
    with lock.held(tmp_path / on_ray.OWN_FILES), pytest.raises(ConfigError, match="is in use by process"):
        backends.run_in(tmp_path, config)
    assert (tmp_path / on_ray.OWN_FILES).is_dir()
    assert not (tmp_path / "result.json").exists()


# ---------------------------------------------------------------- with one


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray with room for two workers, and for one that wants a `slot`."""
    from ray.cluster_utils import Cluster

    place = Path(tempfile.mkdtemp(prefix="ray"))  # short, as the paths of sockets must be
    environment = {
        "PYTHONPATH": os.pathsep.join([*sys.path, "tests"]),
        "RAY_AUTH_MODE": "disabled",  # or Ray leaves a token in the user's home
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_TMPDIR": str(place),
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        head = {"num_cpus": 2, "resources": {"slot": 1}, "include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        made = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray has set its own, for this whole process
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], folder: Path) -> Callable[..., list[str]]:
    """Eight steps of four rows, of which one epoch has 22, on two workers. `plan`: as in ray_rows.py."""

    def make(name: str, *more: str, **plan: Any) -> list[str]:
        rows = folder / f"{name}_rows"
        rows.mkdir(exist_ok=True)
        table = tiny.write_csv(rows, [(f"what is {i}?", ("red", "blue")[i % 2]) for i in range(ROWS)], per_image=2)
        write_plan(folder / name, **plan)
        model = ["model=auto", f"model.path={checkpoint_of('qwen2_vl')}", "adapter.lora_dropout=0.1", "tracker=none"]
        data = ["data=csv", f"data.train={table}", "data._target_=ray_rows.load", f"hydra.run.dir={folder / name}"]
        steps = ["trainer.batch_size=2", f"trainer.max_steps={STEPS}", "trainer.learning_rate=1e-2"]
        often = ["trainer.log_every=1", "trainer.save_every=2", "data.cache_features=off"]
        return [*model, *data, *steps, *often, "backend=ray", "backend.num_workers=2", *more]

    return make


def without_backend(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("backend")]


def write_plan(run: Path, **plan: Any) -> None:
    """What is to happen in a run, as in ray_rows.py."""
    (run.with_name(f"{run.name}_rows") / "plan.json").write_text(json.dumps(plan))


@contextmanager
def let_go(run: Path) -> Iterator[None]:
    """Workers that wait go on once the block is left, however: a run would else wait for ever where a test fails."""
    try:
        yield
    except BaseException:
        write_plan(run)
        raise


def logged(run: Path, name: str) -> dict[int, float]:
    """A column of metrics.jsonl by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def made(run: Path) -> list[dict[str, Any]]:
    """The micro-batches that the workers of a run made."""
    return [json.loads(file.read_text()) for file in run.with_name(f"{run.name}_rows").glob("made_*.json")]


def rows_of_steps(run: Path) -> dict[int, list[int]]:
    """The rows of each step over all ranks, of the last start that made it."""
    notes, found = made(run), {}
    for step in {note["step"] for note in notes}:
        own = [note for note in notes if note["step"] == step]
        _, last = max(note["start"] for note in own)
        found[step] = sorted(row for note in own if note["start"][1] == last for row in note["rows"])
    return found


def ranks_of_steps(run: Path) -> list[int]:
    """How many ranks made each step, in the last start that did."""
    notes = sorted(made(run), key=lambda note: note["start"])
    found = {note["step"]: note["ranks"] for note in notes}
    return [found[step] for step in sorted(found)]


def at_step(run: Path, ranks: int, step: int) -> bool:
    return any((note["ranks"], note["step"]) == (ranks, step) for note in made(run))


def wait_for(news: Callable[[], bool], run: Future[Any] | None = None) -> None:
    """Return once there is `news`, of a run that has not ended."""
    end = time.monotonic() + 300
    while not news():
        assert time.monotonic() < end
        assert run is None or not run.done(), run.exception()
        time.sleep(0.1)


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which is killed at the end of the block if it still runs."""
    with subprocess.Popen([sys.executable, "src/train.py", *words], stderr=subprocess.PIPE, text=True) as command:
        try:
            yield command
        finally:
            command.kill()


@pytest.fixture(scope="module")
def straight(cluster: Any, overrides: Callable[..., list[str]], folder: Path) -> Path:
    result = vlmtune.train(overrides("straight"))
    assert (result["status"], result["steps"]) == ("completed", STEPS)
    return folder / "straight"


def test_a_change_of_the_number_of_workers_and_a_lost_first_rank(
    cluster: Any, overrides: Callable[..., list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker waits at the fourth step until there are two: it costs no restart, and the steps stay the same. In the
    sixth step the first of the two is killed, which costs one. From the change on, this is bit by bit the run of two
    processes that nobody disturbs, and without Ray.
    """
    monkeypatch.setattr(on_ray, "RESIZE_SECONDS", 1.0)
    run, calm, kept = folder / "disturbed", folder / "calm", "trainer.keep_checkpoints=9"
    words = overrides(run.name, *ELASTIC, kept, "backend.max_failures=1", hold=[[1, 3]], kill=[[0, 5]])
    with ThreadPoolExecutor(1) as pool:  # the main thread adds the machine: Ray sets a handler of signals there
        training = pool.submit(vlmtune.train, words)
        with let_go(run):
            wait_for(lambda: at_step(run, 1, 3), training)
            machine = cluster.add_node(num_cpus=1, resources={"slot": 1})
        assert training.result()["status"] == "completed"
    cluster.remove_node(machine)
    log = (run / "train.log").read_text()
    assert (log.count("resuming from step 2"), log.count("resuming from step 4")) == (1, 1)
    steps = rows_of_steps(run)
    first = [row for step in range(ROWS // 4 + 1) for row in steps[step]]
    assert sorted(first) == list(range(ROWS)), "an epoch has each row once"
    assert ranks_of_steps(run) == [1, 1, 2, 2, 2, 2, 2, 2]
    assert not [file for file in run.iterdir() if file.name.startswith(".") and file.name != ".lock"]
    assert_losses_of_one_process(overrides, folder, run.name)
    shutil.copytree(run, calm, ignore=shutil.ignore_patterns("model", "result.json", "step_00000[468]"))
    own = without_backend(overrides(calm.name, ELASTIC[-1], kept, "trainer.rows_per_step=4", "resume=auto"))
    forked.as_ranks(2, folder / "calm.log", vlmtune.train, own)
    assert rows_of_steps(calm) == {step: steps[step] for step in range(2, STEPS)}
    assert_same_end(run, calm)


def assert_losses_of_one_process(overrides: Callable[..., list[str]], folder: Path, name: str) -> None:
    """The run's losses are those of the same steps in this process, but for the order of sums."""
    alone = folder / f"{name}_alone"
    words = overrides(
        alone.name, "trainer.rows_per_step=4", *ELASTIC[2:], "data._target_=vlmtune.data.table.read_files"
    )
    vlmtune.train(without_backend(words))
    for column, tolerance in (("train/loss", 1e-4), ("train/examples", 0)):
        assert logged(folder / name, column) == pytest.approx(logged(alone, column), abs=tolerance)


@pytest.mark.slow
def test_a_signal_and_a_lost_first_rank(
    cluster: Any,
    straight: Path,
    overrides: Callable[..., list[str]],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command's own process gets the signal in the fourth step, after which the run ends. It goes on, and its first
    rank is killed in the sixth. What it logs, trains and ends with is what the straight run did.
    """
    words = overrides("stopped", f"backend.address={cluster.address}", "backend.max_failures=1", hold=[[2, 3]])
    run = folder / "stopped"
    with started(words) as command:
        wait_for(lambda: at_step(run, 2, 3))
        command.send_signal(signal.SIGTERM)
        wait_for((run / STOP_FILE).exists)
        write_plan(run, kill=[[0, 5]])
        shown = command.communicate(timeout=300)[1]
    result = json.loads((run / "result.json").read_text())
    assert command.returncode == 128 + signal.SIGTERM, shown
    assert (result["status"], result["signal"], result["steps"]) == ("interrupted", signal.SIGTERM, 4)
    assert shown.count("fine-tuning") == 1
    capfd.readouterr()
    assert vlmtune.train([*words, "resume=auto"])["status"] == "completed"
    shown = capfd.readouterr().err
    assert shown.count("resuming from step 4") == 2
    assert "pid=" not in shown
    assert_equal(run, straight)


def assert_equal(run: Path, straight: Path) -> None:
    assert rows_of_steps(run) == rows_of_steps(straight)
    assert_same_end(run, straight)


def assert_same_end(run: Path, other: Path) -> None:
    assert_same_weights(run, other)
    for column in ("train/loss", "train/examples"):
        assert logged(run, column) == logged(other, column)
    assert json.loads((run / "result.json").read_text())["status"] == "completed"


# ---------------------------------------------------------------- more of them


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(straight: Path, overrides: Callable[..., list[str]], folder: Path) -> None:
    """One that only rank 1 meets, in a process that prepares batches, while the other rank waits for it."""
    with pytest.raises(DataError, match="rank 1 can't read a row of step 2"):
        vlmtune.train(overrides("mistaken", "trainer.num_workers=1", fail=[[1, 2]]))
    result = json.loads((folder / "mistaken" / "result.json").read_text())
    assert (result["status"], result["error"]["type"], result["steps"]) == ("failed", "DataError", 2)
    assert len([note for note in made(folder / "mistaken") if note["step"] == 0]) == 2


@pytest.mark.slow
def test_where_no_restart_is_left(straight: Path, overrides: Callable[..., list[str]], folder: Path) -> None:
    """The error says which rank was lost, and the same command goes on."""
    words = overrides("lost", kill=[[1, 3]])
    with pytest.raises(TrainingError, match=r"no restart is left.*resume=") as lost:
        vlmtune.train([*words, "backend.max_failures=0"])
    assert "rank 1: " in str(lost.value)
    result = json.loads((folder / "lost" / "result.json").read_text())
    assert (result["status"], result["error"]["type"]) == ("failed", "TrainingError")
    vlmtune.train([*words, "resume=auto"])
    assert_equal(folder / "lost", straight)


@pytest.mark.slow
def test_a_machine_that_is_taken_away(
    cluster: Any, straight: Path, overrides: Callable[..., list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers, which wait at the fourth step. It costs one of the restarts that are for this alone."""
    monkeypatch.setattr(on_ray, "RESIZE_SECONDS", 1.0)
    budgets = ["backend.max_failures=0", "backend.max_preemptions=1"]
    words = overrides("preempted", *ELASTIC, *budgets, hold=[[2, 3]])
    machine = cluster.add_node(num_cpus=1, resources={"slot": 1})
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(vlmtune.train, words)
        wait_for(lambda: at_step(folder / "preempted", 2, 3), run)
        gcs = ray._raylet.GcsClient(address=cluster.address)
        assert gcs.drain_node(machine.node_id, PREEMPTION, "", int(time.time() * 1000) + 1000)[0]
        time.sleep(2)
        cluster.remove_node(machine)
        assert run.result()["status"] == "completed"
    assert rows_of_steps(folder / "preempted") == rows_of_steps(straight)
    assert ranks_of_steps(folder / "preempted")[1:] == [2, 1, 1, 1, 1, 1, 1]
    assert_losses_of_one_process(overrides, folder, "preempted")


@pytest.mark.slow
def test_a_signal_while_ray_waits_for_room(cluster: Any, overrides: Callable[..., list[str]], folder: Path) -> None:
    address = f"backend.address={cluster.address}"
    words = overrides("waiting", address, "backend.resources_per_worker={CPU: 1, nothing: 1}")
    with started(words) as command:
        wait_for((folder / "waiting" / ".ray" / "waiting").exists)
        time.sleep(5)
        command.send_signal(signal.SIGTERM)
        shown = command.communicate(timeout=300)[1]
    assert command.returncode == 128 + signal.SIGTERM, shown
    assert json.loads((folder / "waiting" / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_sweep_on_a_ray_of_its_own(overrides: Callable[..., list[str]], folder: Path) -> None:
    """Each trial has workers of its own; nothing of Ray is left."""
    place = Path(tempfile.mkdtemp(prefix="ray"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, "tests"]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(place),
    }
    sweep = folder / "sweep"
    words = ["-m", *overrides("unused"), "adapter.r=2,4", f"hydra.sweep.dir={sweep}"]
    try:
        subprocess.run([sys.executable, "src/train.py", *words], env=environment, check=True, capture_output=True)
        assert not [file for file in Path("/proc").glob("*/cmdline") if str(place).encode() in read_or_empty(file)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for trial, rank in (("0", 2), ("1", 4)):
        assert json.loads((sweep / trial / "result.json").read_text())["status"] == "completed"
        assert json.loads((sweep / trial / "model" / "adapter_config.json").read_text())["r"] == rank


def read_or_empty(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # the process has ended
        return b""
