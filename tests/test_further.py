"""More of the same: a run with more epochs than it had, and a new run from another one's adapter."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import tiny
import vlmtune
from grids import sampled
from runs import cut_back, weights, words
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config import compose
from vlmtune.config.adapter_source import CONFIG, WEIGHTS
from vlmtune.config.schema import Config, plain
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.models.parts import base_files
from vlmtune.objectives.next_token import summed_loss
from vlmtune.record import runfolder
from vlmtune.training.model_folder import save_model

Overrides = Callable[..., list[str]]
CONSTANT = "trainer.scheduler.name=constant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("further")


@pytest.fixture(scope="module")
def overrides(checkpoint_of: Callable[[str], Path], folder: Path) -> Overrides:
    """LoRA with dropout on 12 rows in steps of 4: an epoch has three steps."""
    rows = [(f"what is {i}?", ("red", "blue", "a green circle")[i % 3]) for i in range(12)]
    table = tiny.write_csv(folder, rows, per_image=2)

    def make(name: str, *more: str) -> list[str]:
        return [
            *words(checkpoint_of("qwen2_vl"), table),
            f"data.validation={table}",
            "data.max_eval_rows=4",
            "generation.max_new_tokens=4",
            "trainer.batch_size=4",
            "trainer.learning_rate=1e-2",
            "trainer.log_every=1",
            f"hydra.run.dir={folder / name}",
            *more,
        ]

    return make


def logged(run: Path, prefix: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with keys of this prefix, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in row.items() if "second" not in k} for row in rows if any(prefix in key for key in row)]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in found]


def state(run: Path, step: int) -> tuple[bytes, bytes, dict[str, Any]]:
    """Weights, optimizer and progress of a checkpoint, without what tells how the run came to it."""
    saved = run / "checkpoints" / f"step_{step:06d}"
    progress = json.loads((saved / "state.json").read_text())["progress"]
    for key in ("seconds", "first_total", "changes"):
        del progress[key]
    files = ("model.safetensors", "optimizer.safetensors")
    return (*((saved / name).read_bytes() for name in files), progress)  # type: ignore[return-value]


# ---------------------------------------------------------------- more epochs


@pytest.mark.slow
def test_more_epochs_are_those_of_a_run_that_had_them_from_its_start(overrides: Overrides, folder: Path) -> None:
    """Bit for bit: extended when it was complete, and killed and resumed on its way. Its warmup keeps its three steps,
    which are a third of the straight run's.
    """
    keys = (CONSTANT, "trainer.save_every=1", "trainer.keep_checkpoints=9", "trainer.best_metric=eval/loss")
    keys += ("adapter.lora_dropout=0.1",)
    vlmtune.train(overrides("straight", *keys, "trainer.epochs=3", "trainer.scheduler.warmup_fraction=0.3334"))
    first = vlmtune.train(overrides("more", *keys, "trainer.epochs=1", "trainer.scheduler.warmup_fraction=1"))
    run, straight = folder / "more", folder / "straight"
    assert first["steps"] == 3
    second = vlmtune.train([f"resume={run}", "trainer.epochs=3"])
    cut_back(run, 2)
    vlmtune.train([f"resume={run}"])
    cut_back(run, 5)
    third = vlmtune.train([f"resume={run}"])
    assert second["steps"] == third["steps"] == 9
    assert second["metrics"] == third["metrics"]
    assert logged(run, "train/loss") == logged(straight, "train/loss")
    assert [row["train/learning_rate"] for row in logged(run, "train/loss")] == pytest.approx(
        [0, 1e-2 / 3, 2e-2 / 3, *[1e-2] * 6]
    )
    assert logged(run, "eval/loss") == logged(straight, "eval/loss")
    assert state(run, 9) == state(straight, 9)
    weights = "model/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (straight / weights).read_bytes()
    assert json.loads((run / "result.json").read_text())["steps"] == 9
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 3


@pytest.mark.slow
def test_a_schedule_that_is_spread_over_all_steps_says_how_to_go_on(overrides: Overrides, folder: Path) -> None:
    run = folder / "decayed"
    vlmtune.train(overrides("decayed", "trainer.epochs=1"))
    longer = [f"resume={run}", "trainer.epochs=2"]
    with pytest.raises(CheckpointError) as caught:
        vlmtune.train(longer)
    assert "steps in all was 3, now 6: the cosine schedule is spread over all steps" in str(caught.value)
    assert f"add {CONSTANT}. For a different run choose a new hydra.run.dir; adapter.from={run} " in str(caught.value)
    assert vlmtune.train([*longer, CONSTANT])["steps"] == 6
    assert [row["train/learning_rate"] for row in logged(run, "train/loss")][3:] == [1e-2] * 3


@pytest.mark.slow
def test_a_run_that_is_to_end_before_the_step_it_has_reached_is_refused(overrides: Overrides, folder: Path) -> None:
    run = folder / "shorter"
    vlmtune.train(overrides("shorter", CONSTANT, "trainer.epochs=2", "trainer.save_every=2"))
    cut_back(run, 4)
    with pytest.raises(CheckpointError, match="steps in all was 6, now 3: 4 steps are done already"):
        vlmtune.train([f"resume={run}", "trainer.epochs=1"])
    with pytest.raises(CheckpointError, match="steps in all was 6, now 3: 4 steps are done already"):
        vlmtune.train([f"resume={run}", "trainer.max_steps=3"])
    assert vlmtune.train([f"resume={run}", "trainer.max_steps=5"])["steps"] == 5
    with pytest.raises(CheckpointError, match=r"trainer\.epochs was 2\.0, now 9\.0: trainer\.max_steps=5 overrides it"):
        vlmtune.train([f"resume={run}", "trainer.epochs=9"])


@pytest.mark.slow
def test_a_run_that_stopped_early_says_how_to_go_on(overrides: Overrides, folder: Path) -> None:
    run = folder / "early"
    early = ("trainer.best_metric=eval/loss", "trainer.early_stopping_patience=1", "trainer.eval_every=1")
    stopped = vlmtune.train(overrides("early", CONSTANT, *early, "trainer.epochs=4", "trainer.learning_rate=1e4"))
    assert stopped["steps"] < 12
    with pytest.raises(CheckpointError, match=r"stopped early.*add trainer\.early_stopping_patience=null"):
        vlmtune.train([f"resume={run}", "trainer.epochs=5"])
    went_on = vlmtune.train([f"resume={run}", "trainer.epochs=5", "trainer.early_stopping_patience=null"])
    assert went_on["steps"] == 15


# ---------------------------------------------------------------- another run's adapter


@pytest.fixture(scope="module")
def source(overrides: Overrides, folder: Path) -> Path:
    """A complete run with an adapter of rank 4 on some layers."""
    vlmtune.train(overrides("source", "adapter.r=4", "adapter.target_modules=[q_proj,v_proj]", "trainer.epochs=2"))
    return folder / "source"


def test_a_new_run_goes_on_from_the_adapter_and_needs_it_only_at_its_start(
    overrides: Overrides, folder: Path, source: Path
) -> None:
    """It starts with what the other one ended with, and is resumed bit by bit when that one is gone."""
    gone = folder / "gone"
    shutil.copytree(source, gone)
    words = overrides("next", f"adapter.from={gone}", "trainer.save_every=1", "trainer.keep_checkpoints=9")
    result = vlmtune.train(words)
    run = folder / "next"
    before = json.loads((source / "result.json").read_text())["metrics"]
    for name in ("loss", "exact_match"):
        assert result["metrics"][f"baseline/{name}"] == before[f"eval/{name}"]
    config = yaml.safe_load((run / "config.yaml").read_text())["adapter"]
    assert config == yaml.safe_load((source / "config.yaml").read_text())["adapter"] | {"from": str(gone)}
    assert "- started from the adapter of: `gone`" in (run / "model" / "README.md").read_text()
    assert str(gone) in (run / "report.html").read_text()
    wanted = weights(run)
    shutil.rmtree(gone)
    cut_back(run, 1)
    vlmtune.train([f"resume={run}"])
    assert "the adapter starts with" in (run / "train.log").read_text().partition("resuming from step 1")[0]
    found = weights(run)
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    with pytest.raises(CheckpointError, match=rf"adapter\.from was {gone}, now {source}: it can't change on resume"):
        vlmtune.train([f"resume={run}", f"adapter.from={source}"])


@pytest.mark.slow
def test_two_processes_start_from_the_adapter(overrides: Overrides, folder: Path, source: Path) -> None:
    words = (f"adapter.from={source}", "trainer.max_steps=2")
    one = vlmtune.train(overrides("one process", *words))
    two = vlmtune.train(
        overrides("two processes", *words, "trainer.batch_size=2", "backend=accelerate", "backend.num_processes=2")
    )
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    expected, found = weights(folder / "one process"), weights(folder / "two processes")
    assert all((expected[name] - found[name]).abs().max() < 1e-4 for name in expected)


# ---------------------------------------------------------------- which adapter that is, from the command line


def adapter_of(*words: str) -> dict[str, Any]:
    """The `adapter` of a run with these overrides, as config.yaml has it."""
    return plain(compose.read("train", list(words))[0].adapter)


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A run folder with what a new run reads of it before a model is loaded."""
    write_source(tmp_path / "run", tiny.config("base", adapter=RANK_4))
    return tmp_path / "run"


RANK_4 = {"method": "lora", "parts": ["language"], "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def write_source(run: Path, config: Config) -> None:
    (run / "model").mkdir(parents=True)
    runfolder.write_config(run / "config.yaml", config)
    for name in (CONFIG, WEIGHTS):
        (run / "model" / name).write_text("{}")


def test_the_adapter_comes_as_it_is(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {**RANK_4, "from": str(noted)}
    assert adapter_of(f"adapter.from={noted}") == wanted
    assert adapter_of(f"adapter.from={noted / 'model'}") == {**wanted, "from": str(noted / "model")}
    assert adapter_of(f"adapter.from={noted}", "adapter.r=4", "adapter.target_modules=[q_proj,v_proj]") == wanted
    assert adapter_of(f"adapter.from={noted}", "adapter.lora_dropout=0.2") == {**wanted, "lora_dropout": 0.2}
    monkeypatch.chdir(noted.parent)
    assert adapter_of("adapter.from=run") == wanted
    monkeypatch.setenv("HOME", str(noted.parent))
    assert adapter_of("adapter.from=~/run") == wanted


def test_other_values_are_refused_with_both(noted: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_of(f"adapter.from={noted}", "adapter.r=8", "adapter.use_dora=true", "adapter.parts=[vision]")
    assert caught.value.problems == [
        f"adapter.r=8: the adapter in {noted} has 4; leave it out",
        f"adapter.use_dora=true: the adapter in {noted} has null; leave it out",
        f'adapter.parts=["vision"]: the adapter in {noted} has ["language"]; leave it out',
    ]
    with pytest.raises(ConfigError, match=f"adapter=ia3 sets adapter.method=ia3: the adapter in {noted} has lora"):
        adapter_of(f"adapter.from={noted}", "adapter=ia3")
    with pytest.raises(ConfigError, match=r"adapter=none sets adapter\.method=null"):
        adapter_of(f"adapter.from={noted}", "adapter=none")


def test_an_option_with_the_same_values_may_be_named(tmp_path: Path) -> None:
    write_source(tmp_path / "run", compose.read("train", ["adapter=dora"])[0])
    assert adapter_of(f"adapter.from={tmp_path / 'run'}", "adapter=dora")["use_dora"] is True
    with pytest.raises(ConfigError, match=r"^adapter=lora sets adapter.use_dora=null: .* has true; leave it out$"):
        adapter_of(f"adapter.from={tmp_path / 'run'}", "adapter=lora")


def test_a_folder_without_an_adapter_says_what_it_is(noted: Path, tmp_path: Path) -> None:
    def refusal(place: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            adapter_of(f"adapter.from={place}")
        return str(caught.value).removeprefix(f"adapter.from={place}: ")

    assert refusal(tmp_path / "nowhere").startswith("no such folder; give a run, or the folder of an adapter")
    assert refusal(tmp_path) == f"has no {CONFIG}; give a run, or the folder of an adapter that PEFT wrote"
    model = noted / "model"
    (model / CONFIG).rename(model / "config.json")
    whole = f"is a whole model, no adapter; start from it: model=auto model.path={model}"
    assert refusal(noted) == refusal(model) == whole
    shutil.rmtree(model)
    assert refusal(noted) == f"this run has saved no model; bring it to its end first: resume={noted}"


def test_adalora_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "run", compose.read("train", ["adapter=adalora"])[0])
    with pytest.raises(ConfigError, match=r"adapter\.from: not supported with AdaLoRA"):
        adapter_of(f"adapter.from={tmp_path / 'run'}")


# ---------------------------------------------------------------- the weights


ADAPTERS: dict[str, dict[str, Any]] = {
    "biases": {**RANK_4, "bias": "all"},
    "module beside": {**RANK_4, "modules_to_save": ["lm_head"]},
    "vision": {**RANK_4, "parts": ["vision"], "target_modules": ["qkv"]},
}
FILES = ("lora", "dora", "ia3", "vera", "pissa", "rslora", "loha", "lokr", "oft")
QUICK = ("lora", "dora", "ia3", "vera", "pissa", "module beside", "vision")


def keys_of(name: str) -> dict[str, Any]:
    return ADAPTERS[name] if name in ADAPTERS else adapter_of(f"adapter={name}")


def trained(base: Path, run: Path, adapter: dict[str, Any]) -> tiny.Run:
    """A run of two steps, and what it leaves in its folder for a new one."""
    made = tiny.assemble(tiny.config(base, adapter=adapter, max_steps=2, learning_rate=3e-2), ROWS).fit()
    save_model(made.model, made.processor, run / "model")
    runfolder.write_config(run / "config.yaml", made.config)
    runfolder.write_json(run / "environment.json", {"base_model": base_files(made.model, str(base))})
    return made


def logits(run: tiny.Run) -> torch.Tensor:
    batch = padded(run.encoder, ROWS[:3])
    with torch.no_grad():
        return run.model.eval()(**model_inputs(run.model, batch)).logits  # type: ignore[no-any-return]


ROWS = tiny.records(8, per_image=2)


@pytest.mark.parametrize("name", sampled([*FILES, *ADAPTERS], QUICK))
def test_a_new_run_begins_where_the_other_ended(checkpoint_of: Any, tmp_path: Path, name: str) -> None:
    """The same outputs, the same weights that train, and the first loss is that of the other's model."""
    base, keys = checkpoint_of("qwen2_vl"), keys_of(name)
    before = trained(base, tmp_path / "run", keys)
    source = {**keys, "from": str(tmp_path / "run")}
    after = tiny.assemble(tiny.config(base, adapter=source, max_steps=1, learning_rate=0.0, seed=7), ROWS)
    found, wanted = after.weights(), before.weights()
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(tensor) for key, tensor in wanted.items())
    names = [{key for key, p in run.model.named_parameters() if p.requires_grad} for run in (before, after)]
    assert names[0] == names[1]
    outputs = logits(before)
    assert logits(after).equal(outputs)
    assert not logits(tiny.assemble(tiny.config(base, adapter=keys), ROWS)).equal(outputs)
    first = after.loader.make(0, 0)
    with torch.no_grad():
        loss = float(summed_loss(before.model.eval(), first)) / first.supervised
    assert after.fit().losses[0] == pytest.approx(loss, rel=1e-6)
    assert logits(after).equal(outputs), "without a learning rate nothing changes"


def test_the_base_may_be_quantized_now(checkpoint_of: Any, tmp_path: Path) -> None:
    base = checkpoint_of("qwen2_vl")
    before = trained(base, tmp_path / "run", RANK_4)
    source = {**RANK_4, "from": str(tmp_path / "run")}
    after = tiny.assemble(tiny.config(base, adapter=source, quantization=tiny.QUANTIZED["nf4"]), ROWS)
    wanted = before.weights()
    found = {name: p for name, p in after.model.named_parameters() if p.requires_grad}
    assert found
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


def test_another_base_model_is_refused(checkpoint_of: Any, tmp_path: Path) -> None:
    """By its content, so that it may have been moved."""
    base, moved, other = checkpoint_of("qwen2_vl"), tmp_path / "moved", tmp_path / "other"
    trained(base, tmp_path / "run", RANK_4)
    source = {**RANK_4, "from": str(tmp_path / "run")}
    shutil.copytree(base, moved)
    tiny.assemble(tiny.config(moved, adapter=source), ROWS)
    tiny.build("qwen2_vl", other, seed=1)
    with pytest.raises(ConfigError, match=rf"over the base model {base} \(\w+\), and model\.path={other} \(\w+\)"):
        tiny.assemble(tiny.config(other, adapter=source), ROWS)


def test_a_file_that_was_edited_is_noticed(checkpoint_of: Any, tmp_path: Path) -> None:
    """Another lora_alpha would scale the weights differently; a damaged file is found before the model is opened."""
    base = checkpoint_of("qwen2_vl")
    trained(base, tmp_path / "run", RANK_4)
    source = {**RANK_4, "lora_alpha": 9, "from": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match=r"lora_alpha is 8, and this run has adapter\.lora_alpha=9"):
        tiny.assemble(tiny.config(base, adapter=source), ROWS)
    file = tmp_path / "run" / "model" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not as it was written"):
        tiny.assemble(tiny.config("nowhere", adapter=source), ROWS)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="which may carry code: save it again as safetensors"):
        tiny.assemble(tiny.config("nowhere", adapter=source), ROWS)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.self_attn\.(q|v)_proj|.*\.attn\.qkv"])
def test_an_adapter_that_only_peft_knows(
    checkpoint_of: Any, model_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, targets: Any
) -> None:
    """Its fields are those of PEFT's file, and its parts are told by the command where they are not the language's."""
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": targets}
    theirs = get_peft_model(model_of("qwen2_vl"), LoraConfig(**fields))
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    theirs.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "vlmtune")

    def run(*words: str) -> tiny.Run:
        adapter = adapter_of(f"adapter.from={tmp_path}", *words)
        return tiny.assemble(tiny.config(checkpoint_of("qwen2_vl"), adapter=adapter), ROWS)

    words: list[str] = []
    if isinstance(targets, str):
        with pytest.raises(CheckpointError, match=r"no place for .*; add vision to adapter\.parts=\['language'\]"):
            run()
        words = ["adapter.parts=[language,vision]"]
    found = run(*words)
    torch.testing.assert_close(logits(found), logits(dataclasses.replace(found, model=theirs)), rtol=1e-4, atol=1e-4)
    assert "as its base model" not in caplog.text
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "a/b"}))
    run(*words)
    assert f"names a/b as its base model, and this run has {checkpoint_of('qwen2_vl')}" in caplog.text
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        run()
