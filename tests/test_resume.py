"""A resumed run is the same run, or says what differs: each key is refused, or takes effect and is recorded."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import tiny
import vlmtune
from runs import cut_back, losses
from vlmtune.config.schema import Config, ModelConfig
from vlmtune.data import fingerprint
from vlmtune.data.records import Record, Turn
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.launch import lock
from vlmtune.training import checkpoint, snapshot
from vlmtune.training.checkpoint import load_checkpoint
from vlmtune.training.resume import RULES, Rule, changes, rule_of, values

FOLDER = Path("runs/mine/checkpoints/step_000004")


def a_config(**model: Any) -> Config:
    return tiny.config("weights", adapter=tiny.LORA, quantization=tiny.QUANTIZED["nf4"], model=model, max_steps=None)


def identity(**keys: Any) -> dict[str, Any]:
    """That of a run with these config keys, dots written as two underscores."""
    rows = {"rows per step": 8, "training rows": 20, "data fingerprint": "a", "image content": "b", "seed": 0}
    config = {**values(a_config()), **{key.replace("__", "."): value for key, value in keys.items()}}
    return {**rows, "steps in all": 9, "share_prefix": True, "processes": 1, "config": config}


# ---------------------------------------------------------------- every key has a kind

KEYS = sorted(values(a_config()))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_schema_has_a_kind(key: str) -> None:
    assert rule_of(key) in Rule, f"say in resume.RULES what another value of {key} means for a resumed run"


def test_no_kind_is_given_to_a_key_that_does_not_exist() -> None:
    groups = {key[:end] for key in KEYS for end in [*(i for i, c in enumerate(key) if c == "."), len(key)]}
    assert RULES.keys() <= groups


@pytest.mark.parametrize("key", [key for key in KEYS if rule_of(key) is Rule.FIXED])
def test_another_value_of_what_the_run_is_gets_refused(key: str) -> None:
    was, now = identity(), identity()
    now["config"][key] = "another"
    with pytest.raises(CheckpointError) as caught:
        changes(FOLDER, was, now, 4)
    assert f"{key} was {was['config'][key]}, now another" in str(caught.value)
    assert "adapter.from=runs/mine" in str(caught.value)


@pytest.mark.parametrize("key", [key for key in KEYS if rule_of(key) in (Rule.NEXT_STEP, Rule.RECORDED)])
def test_another_value_of_what_may_change_is_named(key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vlmtune")
    was, now = identity(), identity()
    now["config"][key] = "another"
    before = was["config"][key]
    assert changes(FOLDER, was, now, 4) == [{"step": 4, "key": key, "was": before, "now": "another"}]
    assert f"changed on resume: {key} {before} -> another" in caplog.text


def test_what_changes_nothing_is_not_recorded() -> None:
    assert changes(FOLDER, identity(), identity(tracker__name="tensorboard", trainer__log_every=3), 4) == []


def test_all_differences_are_in_one_error() -> None:
    now = identity(adapter__r=8, data__supervise="all") | {"share_prefix": False}
    with pytest.raises(CheckpointError) as caught:
        changes(FOLDER, identity(), now, 4)
    assert len(caught.value.problems) == 3
    assert "share_prefix was True, now False: set trainer.share_prefix back" in str(caught.value)


def test_a_field_of_the_adapter_that_was_not_set_counts() -> None:
    with pytest.raises(CheckpointError, match="use_rslora was None, now True"):
        changes(FOLDER, identity(), identity(adapter__use_rslora=True), 4)


def test_other_steps_in_all_need_a_constant_learning_rate() -> None:
    longer = identity(trainer__epochs=2.0) | {"steps in all": 18}
    with pytest.raises(CheckpointError, match=r"steps in all was 9, now 18.*scheduler\.name=constant"):
        changes(FOLDER, identity(), longer, 9)
    constant = identity(trainer__epochs=2.0, trainer__scheduler__name="constant") | {"steps in all": 18}
    named = [change["key"] for change in changes(FOLDER, identity(), constant, 9)]
    assert named == ["steps in all", "trainer.epochs", "trainer.scheduler.name"]


def test_a_run_that_stopped_early_does_not_go_on_unasked() -> None:
    early = {"trainer__scheduler__name": "constant", "trainer__early_stopping_patience": 2}
    was, longer = identity(**early), identity(**early, trainer__epochs=2.0) | {"steps in all": 18}
    with pytest.raises(CheckpointError, match=r"2 evaluations in a row.*add trainer\.early_stopping_patience=null"):
        changes(FOLDER, was, longer, 4, since_best=2)
    assert changes(FOLDER, was, longer, 4, since_best=1)
    longer["config"]["trainer.early_stopping_patience"] = None
    assert changes(FOLDER, was, longer, 4, since_best=2)


def test_a_run_can_end_at_the_step_it_has_reached_but_not_before() -> None:
    constant = identity(trainer__scheduler__name="constant")
    with pytest.raises(CheckpointError, match="steps in all was 9, now 3: 4 steps are done already"):
        changes(FOLDER, constant, constant | {"steps in all": 3}, 4)
    assert changes(FOLDER, constant, constant | {"steps in all": 4}, 4)


def test_epochs_that_max_steps_overrides_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"trainer\.epochs was 1\.0, now 2\.0: trainer\.max_steps=9 overrides it"):
        changes(FOLDER, identity(trainer__max_steps=9), identity(trainer__max_steps=9, trainer__epochs=2.0), 4)


def test_what_would_change_nothing_any_more_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"learning_rate.*all 9 steps are done"):
        changes(FOLDER, identity(), identity(trainer__learning_rate=1.0), 9)
    assert changes(FOLDER, identity(), identity(generation__max_new_tokens=3), 9)


def test_another_number_of_processes_goes_on_where_a_step_takes_the_same_rows() -> None:
    two = identity(trainer__batch_size=4) | {"processes": 2}
    assert [change["key"] for change in changes(FOLDER, identity(trainer__batch_size=8), two, 4)] == [
        "processes",
        "trainer.batch_size",
    ]
    many = identity() | {"processes": 2, "rows per step": 16}
    with pytest.raises(CheckpointError, match=r"rows per step was 8, now 16: set trainer\.rows_per_step=8"):
        changes(FOLDER, identity(), many, 4)


def test_an_older_version_is_compared_in_what_it_noted(caplog: pytest.LogCaptureFixture) -> None:
    old = {"rows per step": 8, "training rows": 20, "data fingerprint": "a", "seed": 0}
    assert changes(FOLDER, old, identity(adapter__r=8), 4) == []
    assert "written by an older version; not compared: config, image content" in caplog.text
    with pytest.raises(CheckpointError, match=r"seed was 0, now 1: set trainer\.seed"):
        changes(FOLDER, old, identity() | {"seed": 1}, 4)


def test_a_source_that_has_moved_since_is_the_same_source() -> None:
    def reading(source: str) -> dict[str, Any]:
        return identity() | {"config": {**identity()["config"], "data._target_": source}}

    now = reading("vlmtune.data.sources.easy_vqa.load")
    assert changes(FOLDER, reading("vlmtune.data.easy_vqa.load"), now, 4) == []
    with pytest.raises(CheckpointError, match=r"data\._target_ was vlmtune\.data\.sources\.hub\.load"):
        changes(FOLDER, reading("vlmtune.data.hub.load"), now, 4)


# ---------------------------------------------------------------- changes take effect


@pytest.fixture
def weights(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen2_vl")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_hyper_parameters_are_those_of_the_resumed_config(weights: Path, tmp_path: Path, name: str) -> None:
    def run(**optimizer: Any) -> tiny.Run:
        config = tiny.config(weights, max_steps=4, optimizer={"name": name, **optimizer})
        return tiny.assemble(config, tiny.records(8))

    first = run().fit(stop_after=2)
    taken = snapshot.take(first.model, first.optimizer, None, first.progress, {})
    saved = checkpoint.write(tmp_path, taken, keep=1)
    second = run(weight_decay=0.5, beta2=0.9)
    second.config.trainer.learning_rate = 7e-3
    load_checkpoint(saved, second.model, second.optimizer, None, {})
    groups = second.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["betas"][1] for group in groups if "betas" in group} == {0.9}
    old, new = first.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n][key], new[n][key]) for n in old for key in old[n] if torch.is_tensor(old[n][key]))


# ---------------------------------------------------------------- what images and models hold


@pytest.fixture
def pictures(tmp_path: Path) -> list[Record]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{n}.bmp" for n in range(3)]
    for n, path in enumerate(paths):
        Image.new("RGB", (160, 160), (n, 0, 0)).save(path)  # 77 kB
    return [Record((Turn("What?", ("red",)),), (path,), path.name) for path in [*paths, paths[0]]]


def test_the_fingerprint_is_that_of_the_images_content(pictures: list[Record], tmp_path: Path) -> None:
    before = fingerprint.image_fingerprint(pictures)
    for record in pictures:
        os.utime(record.images[0], (1, 1))  # type: ignore[arg-type]
    assert fingerprint.image_fingerprint(pictures) == before
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "images", moved)
    elsewhere = [dataclasses.replace(r, images=(moved / Path(str(r.images[0])).name,)) for r in pictures]
    assert fingerprint.image_fingerprint(elsewhere) == before
    Image.new("RGB", (160, 160), (9, 9, 9)).save(moved / "1.bmp")  # as large as before
    assert fingerprint.image_fingerprint(elsewhere) != before


@pytest.mark.parametrize("at", [0, 77_000 // 2, 76_000])
def test_head_middle_and_tail_of_a_file_count(tmp_path: Path, at: int) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(77_000))
    before = fingerprint.sampled(file)
    content = bytearray(77_000)
    content[at] = 1
    file.write_bytes(content)
    assert fingerprint.sampled(file) != before
    file.write_bytes(bytes(77_001))
    assert fingerprint.sampled(file) != before


def test_images_in_memory_count_by_their_pixels_or_bytes() -> None:
    def rows(*images: Any) -> list[Record]:
        return [Record((Turn("What?", ("red",)),), (image,)) for image in images]

    of = fingerprint.image_fingerprint
    assert of(rows(tiny.image(seed=1))) == of(rows(tiny.image(seed=1))) != of(rows(tiny.image(seed=2)))
    assert of(rows(b"1")) != of(rows(b"2"))
    assert of(rows(b"1", b"2")) != of(rows(b"2", b"1"))


def test_a_base_model_with_other_weights_is_another_one(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(weights, copy)
    before = fingerprint.model_files(str(weights), None)
    assert fingerprint.model_files(str(copy), None) == before
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint.model_files(str(copy), None) != before
    assert fingerprint.model_files("a/b", "c1") != fingerprint.model_files("a/b", "c2")


# ---------------------------------------------------------------- whole runs

Overrides = Callable[..., list[str]]


@pytest.fixture
def overrides(weights: Path, tmp_path: Path) -> Overrides:
    def make(*more: str, name: str = "run", steps: int = 4) -> list[str]:
        if not (tmp_path / "rows.csv").exists():
            tiny.write_csv(tmp_path, [(f"what is {i}?", "red") for i in range(12)], per_image=2)
        return [
            "model=auto",
            f"model.path={weights}",
            "data=csv",
            f"data.train={tmp_path / 'rows.csv'}",
            "tracker=none",
            "trainer.save_every=2",
            f"trainer.max_steps={steps}",
            "trainer.batch_size=4",
            f"hydra.run.dir={tmp_path / name}",
            *more,
        ]

    return make


@pytest.mark.slow
def test_a_change_is_applied_recorded_and_kept(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlmtune.train(overrides("trainer.scheduler.name=constant"))
    cut_back(run, 2)
    vlmtune.train([f"resume={run}", "trainer.learning_rate=5e-3", "trainer.max_steps=6"])
    changed = [
        {"step": 2, "key": "steps in all", "was": 4, "now": 6},
        {"step": 2, "key": "trainer.learning_rate", "was": 2e-4, "now": 5e-3},
        {"step": 2, "key": "trainer.max_steps", "was": 4, "now": 6},
    ]
    assert yaml.safe_load((run / "environment.json").read_text())["changes"] == changed
    assert "changed on resume: trainer.learning_rate 0.0002 -> 0.005" in (run / "train.log").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["learning_rate"] == 5e-3
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert yaml.safe_load(last)["train/learning_rate"] == 5e-3
    assert vlmtune.train([f"resume={run}"])["steps"] == 6
    assert yaml.safe_load((run / "environment.json").read_text())["changes"] == changed


def test_a_refused_resume_leaves_the_run_as_it_was(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlmtune.train(overrides())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    with pytest.raises(CheckpointError, match=r"adapter\.lora_alpha was \d+, now 99"):
        vlmtune.train([f"resume={run}", "adapter.lora_alpha=99"])
    assert {path: path.read_bytes() for path in before} == before
    Image.new("RGB", (56, 56), "green").save(tmp_path / "0.png")
    with pytest.raises(CheckpointError, match="image content was"):
        vlmtune.train([f"resume={run}"])


def test_a_look_at_a_run_leaves_its_result(overrides: Overrides, tmp_path: Path) -> None:
    vlmtune.train(overrides())
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert vlmtune.train([f"resume={tmp_path / 'run'}", "preflight=only"])["status"] == "preflight"
    assert (tmp_path / "run" / "result.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_with_two_processes_and_back(overrides: Overrides, tmp_path: Path) -> None:
    """Without a word about batch sizes. A step takes the same rows; without dropout the losses are those of one
    process.
    """
    run, straight = tmp_path / "run", tmp_path / "straight"
    vlmtune.train(overrides("trainer.log_every=1", name="straight"))
    vlmtune.train(overrides("trainer.log_every=1"))
    cut_back(run, 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "src/train.py", f"resume={run}"]
    subprocess.run(command, check=True)
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)
    cut_back(run, 2)
    assert vlmtune.train([f"resume={run}"])["steps"] == 4
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)


@pytest.mark.slow
def test_config_yaml_edited_by_hand_is_compared_too(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlmtune.train(overrides())
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("system_prompt: null", "system_prompt: Be brief."))
    with pytest.raises(CheckpointError, match=r"model\.system_prompt was None, now Be brief\."):
        vlmtune.train([f"resume={run}"])


@pytest.mark.slow
def test_data_and_run_may_move(overrides: Overrides, tmp_path: Path) -> None:
    vlmtune.train(overrides())
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in [*tmp_path.glob("*.png"), tmp_path / "rows.csv", tmp_path / "run"]:
        shutil.move(path, moved)
    cut_back(moved / "run", 2)
    assert vlmtune.train([f"resume={moved / 'run'}", f"data.train={moved / 'rows.csv'}"])["steps"] == 4


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_its_steps_alone(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlmtune.train(overrides(name="straight"))
    vlmtune.train(overrides())
    (run / "checkpoints" / "step_000004" / "optimizer.safetensors").write_bytes(b"")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{}\n[1]\n"step"\n')
    assert vlmtune.train([f"resume={run}"])["steps"] == 4
    log = (run / "train.log").read_text()
    assert "skipped a damaged checkpoint" in log
    assert "left out 4 lines that can't be read" in log
    found, wanted = (
        (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("run", "straight")
    )
    assert found == wanted


def test_the_base_of_a_failed_start_is_not_taken_over(tmp_path: Path) -> None:
    """A model that is written anew depends on the seed; a start that failed may have had another."""
    from vlmtune import api

    run = tmp_path / "run"
    (run / "base").mkdir(parents=True)
    (run / "base" / "config.json").write_text("half")
    (run / "result.json").write_text('{"status": "failed"}')
    (run / "config.yaml").write_text("model: {name: auto}\n")
    config = tiny.config(None)
    config.model = ModelConfig(fresh="vlmtune.models.nowhere.build")
    config.data.train = str(tmp_path / "gone.csv")
    with pytest.raises(vlmtune.VlmtuneError):
        api.run_in(run, config)
    assert not (run / "base").exists()


@pytest.mark.parametrize(
    ("status", "model", "way"),
    [
        ("completed", "config.json", "start a new run: model=auto model.path={run}/model"),
        ("completed", "adapter_config.json", "start a new run: adapter.from={run}"),
        ("failed", "config.json", "hydra.run.dir={run}"),
    ],
)
def test_a_run_without_a_checkpoint_says_what_to_do_instead(tmp_path: Path, status: str, model: str, way: str) -> None:
    (tmp_path / "result.json").write_text(f'{{"status": "{status}"}}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / model).touch()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest(tmp_path)
    assert str(caught.value).endswith(way.format(run=tmp_path))


def test_a_start_killed_in_its_first_save_can_be_started_again(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half = run / "checkpoints" / ".step_000002.partial"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    (run / lock.NAME).touch()
    (run / "config.yaml").write_text("model: {name: auto, path: x}\n")
    with pytest.raises(ConfigError):
        vlmtune.train([f"resume={run}"])
    assert vlmtune.train(overrides())["steps"] == 4
    assert sorted(path.name for path in half.parent.iterdir()) == ["step_000002", "step_000004"]


def test_the_rows_of_an_older_version_are_the_same_rows() -> None:
    """Their fingerprint is as it was before a turn said whether its answer is trained on."""
    first = Record((Turn("what?", ("red", "blue")),), (Path("a/1.png"),), "1")
    assert fingerprint.fingerprint([first, asking()]) == "73807d9a23bcb87cf7237b5a"
    assert fingerprint.fingerprint([first, asking(trained=False)]) != "73807d9a23bcb87cf7237b5a"


def asking(**fields: Any) -> Record:
    return Record((Turn("who?", ("me",), **fields),), (), "2")


# ---------------------------------------------------------------- resume=auto: the same command again


def test_the_same_command_starts_resumes_and_then_has_nothing_to_do(overrides: Overrides, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    vlmtune.train(overrides("trainer.log_every=1", name="straight"))
    words = overrides("trainer.log_every=1", "resume=auto")
    vlmtune.train(words)
    cut_back(run, 2)
    again = vlmtune.train(words)
    assert "resuming from step 2" in (run / "train.log").read_text()
    assert losses(run) == losses(straight)
    assert (run / "model" / "adapter_model.safetensors").read_bytes() == (
        straight / "model" / "adapter_model.safetensors"
    ).read_bytes()
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    assert vlmtune.train(words) == again
    assert "this run is complete, nothing is left to do" in (run / "train.log").read_text()
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again(overrides: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = overrides("resume=auto", "trainer.log_every=1")
    with pytest.raises(ConfigError, match="has no trainable weight"):
        vlmtune.train([*words, "trainer.learning_rate_of.vision=1e-5"])
    assert vlmtune.train(words)["steps"] == 4
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")  # as if it had been killed early
    assert vlmtune.train(words)["steps"] == 4


@pytest.mark.slow
def test_a_run_that_keeps_no_checkpoints_is_started_again_after_a_kill(overrides: Overrides, tmp_path: Path) -> None:
    """Killed in its last evaluation, after the model was saved."""
    words = overrides("resume=auto", "trainer.save_every=null")
    vlmtune.train(words)
    (tmp_path / "run" / "result.json").unlink()
    assert vlmtune.train(words)["status"] == "completed"


@pytest.mark.slow
def test_another_run_is_no_restart(overrides: Overrides, tmp_path: Path) -> None:
    words = overrides("resume=auto", "trainer.save_every=null")
    vlmtune.train(words)
    assert vlmtune.train(words)["status"] == "completed"
    with pytest.raises(ConfigError, match="holds a run already"):
        vlmtune.train([*words, "trainer.seed=1"])
    vlmtune.train(overrides("resume=auto", name="saved"))
    with pytest.raises(CheckpointError, match=r"adapter\.r was \d+, now 3"):
        vlmtune.train(overrides("resume=auto", "adapter.r=3", name="saved"))


@pytest.mark.slow
def test_a_run_with_damaged_checkpoints_alone_is_not_started_anew(overrides: Overrides, tmp_path: Path) -> None:
    """It may be the work of days; the error says how it is started anew."""
    run, words = tmp_path / "run", overrides("resume=auto")
    vlmtune.train(words)
    (run / "result.json").unlink()
    for folder in checkpoint.all_checkpoints(run / "checkpoints"):
        (folder / "model.safetensors").unlink()
    own = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    named = r"delete .*checkpoints and start[\s\S]*step_000004[\s\S]*step_000002"
    for _ in range(2):  # what a scheduler does
        with pytest.raises(CheckpointError, match=named):
            vlmtune.train(words)
    assert {path: path.read_bytes() for path in own} == own
    shutil.rmtree(run / "checkpoints")
    assert vlmtune.train(words)["status"] == "completed"


def test_a_folder_that_is_new_at_each_start_is_refused(overrides: Overrides) -> None:
    words = [word for word in overrides("resume=auto") if not word.startswith("hydra")]
    with pytest.raises(ConfigError, match="the same folder at each start"):
        vlmtune.train(words)


def as_if_killed_at(run: Path, step: int) -> None:
    cut_back(run, step)
    shutil.rmtree(run / "model")


@pytest.mark.slow
@pytest.mark.parametrize("size", [["trainer.batch_size=2"], ["trainer.batch_tokens=150", "trainer.epochs=3"]])
def test_the_same_command_goes_on_with_any_number_of_processes(
    overrides: Overrides, tmp_path: Path, size: list[str]
) -> None:
    """From 2 to 4, to 1 and to 2: the first rank looks at the folder, and a step takes the same rows."""
    run = tmp_path / "run"
    words = overrides("trainer.log_every=1", "trainer.save_every=1", "trainer.keep_checkpoints=9", "resume=auto", *size)

    def go(processes: int) -> None:
        command = [sys.executable, "src/train.py", *words, "backend=accelerate", f"backend.num_processes={processes}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    go(2)
    wanted, result = losses(run), yaml.safe_load((run / "result.json").read_text())
    for step, processes in ((1, 4), (2, 1), (3, 2)):
        as_if_killed_at(run, step)
        go(processes)
        assert f"resuming from step {step}" in (run / "train.log").read_text()
        assert losses(run) == pytest.approx(wanted, abs=1e-5)
        assert yaml.safe_load((run / "result.json").read_text())["examples"] == result["examples"]
    as_if_killed_at(run, 2)
    go(2)
    own = [path for path in run.rglob("*") if path.is_file() and path.name != "train.log"]
    files = {path: path.read_bytes() for path in own if ".hydra" not in path.parts}
    go(4)
    assert {path: path.read_bytes() for path in files} == files, "nothing is left to do"
