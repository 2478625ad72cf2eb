"""The schema, its YAML files and the strict way between them: every mistake is named at once, nothing slips through."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import vlmtune
from vlmtune.config import compose, installed
from vlmtune.config import fields as known_fields
from vlmtune.config import schema as config
from vlmtune.errors import ConfigError
from vlmtune.models.peft_config import peft_config
from vlmtune.models.quantization import quantization_config

ROOT = config.home()
OPTIONS = [(group, option) for group, options in compose.groups().items() for option in options]
READABLE = {
    ("model", "auto"): ["model.path=folder"],
    ("data", "csv"): ["data.train=rows.csv"],
    ("backend", "ray"): ["backend.num_workers=2"],
}
"""What an option asks the user for."""


def read(*overrides: str, multirun: bool = False) -> config.Config:
    return compose.read("train", overrides, multirun=multirun)[0]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*overrides)
    return caught.value.problems


# ---------------------------------------------------------------- the files


ON_RAY = ["backend=ray", "backend.num_workers=2"]
APART = ("adapter", "quantization", "sharding", "experiment", "sweeps")
"""Groups whose options don't go with every option of others."""


@pytest.mark.parametrize("number", range(max(len(options) for options in compose.groups().values())))
def test_every_option_composes(number: int) -> None:
    """The options with this number of all groups together."""
    chosen = {group: options[number % len(options)] for group, options in compose.groups().items()}
    together = [(group, option) for group, option in chosen.items() if group not in APART]
    read(
        *(f"{group}={option}" for group, option in together), *(o for pair in together for o in READABLE.get(pair, []))
    )


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in APART[:-1]])
def test_every_option_of_a_group_apart_composes(group: str, option: str) -> None:
    read(f"{group}={option}", *READABLE.get((group, option), []))


@pytest.mark.parametrize("name", compose.groups()["sweeps"])
def test_every_sweep_composes_and_its_values_are_valid(name: str) -> None:
    """All trials of a grid; both ends of each interval of a search."""
    composed = compose.compose("train", [f"sweeps={name}"], multirun=True)
    for key, values in (composed.hydra.sweeper.get("params") or {}).items():
        [swept] = compose.parse([f"{key}={values}"])
        own = swept.value()
        for value in [own.start, own.end] if swept.is_interval_sweep() else swept.sweep_string_iterator():
            read(f"sweeps={name}", f"{key}={value}", multirun=True)


@pytest.mark.parametrize("name", compose.groups()["sweeps"])
def test_every_sweep_asks_a_question_and_shows_its_command(name: str) -> None:
    line = (ROOT / "sweeps" / f"{name}.yaml").read_text().splitlines()[1]
    assert "?" in line
    assert f"python src/train.py -m sweeps={name}" in line


def test_the_sweep_of_wandbs_server_gives_valid_overrides() -> None:
    """As `wandb agent` makes its words from a trial's values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    assert "wandb_bayes" not in compose.groups()["sweeps"]  # it is no file of Hydra's
    file = yaml.safe_load((ROOT / "sweeps" / "wandb_bayes.yaml").read_text())
    assert (ROOT / file["program"]).is_file()
    for end in ("min", "max"):
        chosen = {
            key: {"value": each.get(end, each.get("values", [0])[-1])} for key, each in file["parameters"].items()
        }
        words = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        command = create_sweep_command(list(file["command"]))
        read(*[word for word in command if "=" in word], *words)


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in config.SCHEMA])
def test_no_option_repeats_a_default(group: str, option: str) -> None:
    """The schema is their only place. What an option is named for stays in its file, whatever the default."""
    values = yaml.safe_load((ROOT / "conf" / group / f"{option}.yaml").read_text()) or {}
    if group in values:  # a file that sets keys of several groups
        values = values[group]
    own = {"name", "_target_", "method", "metrics", "temperature"}
    defaults = config.defaults()[group]
    assert [key for key, value in values.items() if key not in own and repeats(value, defaults.get(key, ...))] == []


def repeats(value: Any, default: Any) -> bool:
    if isinstance(value, dict) and isinstance(default, dict):
        return any(repeats(inner, default.get(key, ...)) for key, inner in value.items())
    return bool(value == default)


def test_the_composed_run_shows_every_key() -> None:
    """`--help` and `--cfg job` print it."""
    composed = OmegaConf.to_container(compose.compose("train", ["model=auto"]))
    for group, defaults in config.defaults().items():
        assert not isinstance(defaults, dict) or defaults.keys() <= composed[group].keys()


def test_every_option_starts_with_what_it_is() -> None:
    for group, option in OPTIONS:
        folder = ROOT if group == "sweeps" else ROOT / "conf"
        lines = (folder / group / f"{option}.yaml").read_text().splitlines()
        first = lines[1] if lines[0].startswith("# @package") else lines[0]
        assert first.startswith("# "), f"{group}/{option}.yaml"


def test_every_model_but_pico_and_auto_shows_its_command_and_pins_a_revision() -> None:
    for option in set(compose.groups()["model"]) - {"pico", "auto"}:
        text = (ROOT / "conf" / "model" / f"{option}.yaml").read_text()
        revision = OmegaConf.create(text).revision
        assert f"python src/train.py model={option} " in text
        pinned = len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        assert pinned or "# unpinned" in text, f"{option}: {revision}"


@pytest.mark.parametrize("option", compose.groups()["adapter"])
def test_every_adapter_file_names_its_paper(option: str) -> None:
    text = (ROOT / "conf" / "adapter" / f"{option}.yaml").read_text()
    assert "arXiv:" in text.splitlines()[0] or option == "none"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("option", compose.groups()["adapter"])
def test_every_adapter_file_makes_something_of_the_language_model_trainable(
    option: str, model_of: Callable[[str], Any]
) -> None:
    from vlmtune.models.adapters import adapt
    from vlmtune.models.parts import find_parts

    model = model_of("qwen2_vl")
    parts = find_parts(model)
    adapted = adapt(model, read(f"adapter={option}"), parts)
    trained = {parts.of(name) for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == ({"vision", "projector", "language", "head"} if option == "none" else {"language"})


# ---------------------------------------------------------------- the schema


def test_every_field_is_described_by_a_sentence() -> None:
    tree = ast.parse(Path(config.__file__).read_text())
    schemas = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]
    assert {node.name for node in schemas} >= {"Config", "ModelConfig", "TrainerConfig", "DataConfig"}
    silent = []
    for schema in schemas:
        for node, after in zip(schema.body, [*schema.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not is_sentence(after):
                silent.append(f"{schema.name}.{node.target.id}")
    assert silent == []


def is_sentence(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and node.value.value.endswith(".")
    )


# ---------------------------------------------------------------- what is wrong


def test_all_problems_come_in_one_error_with_what_would_work() -> None:
    found = problems(
        "model=qwen2vl_7",
        "trainer.epoch=2",
        "trainer.batch_size=many",
        "trainer.scheduler.warmup_fraction=1.5",
        "trainer.precision=bf61",
        "optimiser=adamw",
        "quantization.bits=4",
        "data.columns=3",
    )
    assert found == [
        "model=qwen2vl_7: did you mean qwen2vl_7b or qwen2vl_72b or qwen2_5vl_7b?",
        "optimiser: no such key; did you mean optimizer?",
        "quantization.bits: has no effect with quantization=none",
        "trainer.epoch: no such key; did you mean epochs?",
        "trainer.batch_size='many': must be of type int",
        "trainer.scheduler.warmup_fraction=1.5: must be at least 0 and at most 1",
        "trainer.precision=bf61: did you mean bf16?",
        "data.columns=3: is a group of keys; set one of image, question, answer, conversation, system",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trainer.batch_size=0", "trainer.batch_size=0: must be at least 1"),
        ("trainer.batch_size=1.5", "trainer.batch_size=1.5: must be of type int"),
        ("trainer.batch_size=true", "trainer.batch_size=true: must be of type int"),
        ("trainer.batch_size=null", "trainer.batch_size=null: must be of type int"),
        ("trainer.epochs=0", "trainer.epochs=0.0: must be above 0"),
        ("trainer.learning_rate=nan", "trainer.learning_rate=nan: must be at least 0"),
        ("trainer.seed=${nowhere}", "trainer.seed: Interpolation key 'nowhere' not found"),
        ("trainer.epochs.x=1", "trainer.epochs={'x': 1}: must be of type float"),
        ("model.freeze=vision", "model.freeze='vision': must be of type list[str]"),
        ("adapter.parts=language", "adapter.parts=language: must be a list, for instance [language]"),
        ("quantization.parts=null", "quantization.parts=None: must be a list, for instance [language]"),
        ("adapter.parts=[lenguage]", "adapter.parts: lenguage is not a part; did you mean language?"),
        ("adapter=lorra", "adapter=lorra: did you mean lora or rslora or lokr?"),
        ("~trainer.seed", "~trainer.seed: keys can't be removed; set another value"),
        ("trainer.eval_every=0", "trainer.eval_every=0: must be a number of steps, `epoch` or null"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override: str, problem: str) -> None:
    assert problems(override) == [problem]


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (["model.freeze=[vision]"], "model.freeze=['vision']: with an adapter the whole base model is frozen"),
        (["adapter=none", "quantization=nf4"], "quantization: quantized weights can't be trained"),
        (["adapter=loha", "quantization=nf4"], "adapter=loha: PEFT does not support it on 4-bit weights"),
        (["adapter=lokr", "quantization=fp4"], "adapter=lokr: PEFT does not support it on 4-bit weights"),
        (["adapter=pissa", "quantization=int8"], "adapter.init_lora_weights=pissa: decomposes the base weights"),
        (["model.image.min_tokens=9", "model.image.max_tokens=4"], "model.image.min_tokens=9: above"),
        (["trainer.precision=fp16", "model.dtype=bf16"], "trainer.precision=fp16: can't be combined with"),
        (["model=auto"], "model.path: missing"),
        (["model.path=a/b", "model.trust_remote_code=true", "model.revision=main"], "model.revision=main: code from a"),
        (["model.save_layout=original"], "model.save_layout=original: is for whole models"),
        (["trainer.early_stopping_patience=2", "trainer.eval_every=5"], "trainer.early_stopping_patience: also needs"),
        (
            ["trainer.best_metric=eval/exact", "trainer.eval_every=5"],
            "trainer.best_metric=eval/exact: choose from",
        ),
        (["trainer.best_metric=eval/loss", "trainer.eval_every=null"], "trainer.best_metric: also needs"),
        (["data.ignore=[answer]"], "data.ignore: answer is the column that data.columns.answer reads"),
        (["data.streaming=true"], "data.streaming, data.subset: are for data=hub"),
        (["data.header=[image_path,question,answer]"], "data.header: is for CSV and TSV files"),
        (["data=csv", "data.train=a.csv", "data.header=[a,a]"], "data.header=['a', 'a']: must name each column once"),
        (["adapter=ia3", "optimizer.loraplus_lr_ratio=16"], "optimizer.loraplus_lr_ratio: is for LoRA's B matrices"),
        (["adapter=none", "model.dtype=fp16"], "model.dtype=fp16: weights in fp16 can't be trained"),
        (["optimizer=adamw_8bit", "optimizer.offload=true"], "optimizer.offload: bitsandbytes has no 8-bit step"),
        (["optimizer=paged_adamw", "optimizer.offload=true"], "optimizer.offload: the state of a paged optimizer"),
        (["optimizer=paged_adamw_8bit", "optimizer.offload=true"], "optimizer.offload: the state of a paged"),
        (["optimizer=muon", "optimizer.offload=true"], "optimizer.offload: its matrix products"),
        (["trainer.rows_per_step=8", "trainer.batch_tokens=99"], "trainer.rows_per_step: the rows of a step vary"),
        (["trainer.passes_per_step=8"], "trainer.passes_per_step: is for trainer.batch_tokens"),
        (
            [
                "backend=ray",
                "backend.num_workers=2",
                "backend.use_gpu=true",
                "sharding=fsdp",
                "sharding.cpu_offload=true",
            ],
            "sharding.cpu_offload: Ray's workers exchange on their GPUs alone",
        ),
    ],
)
def test_an_impossible_combination_is_refused(overrides: list[str], starts: str) -> None:
    assert problems(*overrides)[0].startswith(starts)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.max_grad_norm=1", "too late for clipping; set trainer.max_grad_norm=null"),
        ("trainer.gradient_accumulation_steps=2", "set trainer.gradient_accumulation_steps=1"),
        ("trainer.rows_per_step=99", "leave out trainer.rows_per_step"),
        ("trainer.nonfinite=skip", "too late to skip it; set trainer.nonfinite=stop"),
        ("trainer.precision=fp16", "use trainer.precision=bf16 or fp32"),
        ("adapter=adalora", "AdaLoRA ranks its directions by the gradients of the whole step"),
    ],
)
def test_a_step_in_backward_is_refused_where_it_comes_too_early(override: str, reason: str) -> None:
    words = ["optimizer.step_in_backward=true", "trainer.max_grad_norm=null"]
    read(*words)
    [problem] = problems(*words, override)
    assert problem.startswith("optimizer.step_in_backward: ")
    assert reason in problem


def test_several_impossible_combinations_are_listed_together() -> None:
    assert len(problems("model=auto", "model.freeze=[vison]", "trainer.best_metric=eval/exact_mach")) == 4


def test_a_mistyped_adapter_field_is_answered_with_the_near_ones_and_all() -> None:
    [problem] = problems("adapter.lora_dropuot=0.1")
    assert problem.startswith(
        "adapter.lora_dropuot: lora has no such field; did you mean lora_dropout? choose from: r, target_modules, "
    )


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_does_not_bypass_the_schema(plus: str) -> None:
    """Hydra's own error text suggests `+key=`, which adds the key next to the schema."""
    assert problems(f"{plus}trainer.epoch=2") == ["trainer.epoch: no such key; did you mean epochs?"]
    assert problems(f"{plus}epochs=2")[0].startswith("epochs: no such key")


@pytest.mark.parametrize("override", ["sweeps=lora_rnk", "+sweeps=lora_rnk"])
def test_a_mistyped_sweep_is_no_silent_single_run(override: str) -> None:
    assert problems(override) == ["sweeps=lora_rnk: did you mean lora_rank?"]


@pytest.mark.parametrize("override", ["adapter.r=4,8", "model=pico,qwen2vl_7b", "sweeps=lora_rank"])
def test_several_values_need_a_multirun(override: str) -> None:
    """vlmtune.train(["adapter.r=4,8"]) must not quietly train with 4."""
    assert problems(override)[0].startswith(f"{override}: means several runs; add -m")
    read(override, multirun=True)


@pytest.mark.parametrize("word", ["foo", "trainer.epochs=[1", "=3"])
def test_what_is_no_override_is_a_usage_error(word: str) -> None:
    with pytest.raises(vlmtune.errors.UsageError, match="is not an override; write key=value"):
        read(word)


def test_the_python_way_in_raises_the_same_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean epochs"):
        vlmtune.train(["trainer.epoch=2", f"hydra.run.dir={tmp_path / 'run'}"])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is right


def test_keys_of_the_schema_can_be_set_where_no_yaml_file_names_them() -> None:
    found = read(
        "adapter=none", "model.freeze=[vision]", "trainer.share_prefix=off", "trainer.learning_rate_of.vision=1e-5"
    )
    assert found.model.freeze == ["vision"]
    assert found.trainer.share_prefix == "off"
    assert found.trainer.learning_rate_of == {"vision": 1e-5}
    assert read("adapter.use_dora=true").adapter.fields["use_dora"] is True
    assert read("model.image.min_tokens=4").model.image.min_tokens == 4


def test_learning_rates_without_a_dot_are_numbers() -> None:
    """PyYAML reads 1e-4 as a string."""
    assert read("trainer.learning_rate=1e-4").trainer.learning_rate == 1e-4


def test_the_readme_line_of_the_guide_composes() -> None:
    found = read("model=qwen2vl_7b", "adapter=lora", "quantization=nf4", "data=csv", "data.train=vqa.csv")
    assert (found.model.path, found.adapter.fields["r"]) == ("Qwen/Qwen2-VL-7B-Instruct", 16)
    assert found.quantization.fields["bnb_4bit_quant_type"] == "nf4"


# ---------------------------------------------------------------- PEFT's and transformers' own fields


def test_a_wrong_field_is_answered_without_importing_what_defines_it() -> None:
    code = (
        "import sys\n"
        "from vlmtune.config import compose\n"
        "from vlmtune.errors import ConfigError\n"
        "try: compose.read('train', ['adapter.zzz=1', 'quantization=nf4', 'quantization.zzz=1'])\n"
        "except ConfigError as error: print(error)\n"
        "print([name for name in ('torch', 'peft', 'transformers', 'pandas', 'wandb') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    adapter, quantization, imported = done.stdout.splitlines()
    assert adapter.startswith("adapter.zzz: lora has no such field; choose from: r, target_modules, ")
    assert all(name in adapter for name in ("lora_alpha", "lora_dropout", "use_dora"))
    assert quantization.startswith("quantization.zzz: bitsandbytes_4bit has no such field; choose from: ")
    assert "bnb_4bit_quant_type" in quantization
    assert imported == "[]"


def test_the_table_of_fields_is_that_of_the_installed_versions() -> None:
    """After another PEFT or transformers is pinned: python -m vlmtune.config.installed > .../known_fields.json."""
    if any(version(known["package"]) != known["version"] for known in known_fields.table().values()):
        pytest.skip("made from other versions than those that are installed")
    assert known_fields.TABLE.read_text(encoding="utf-8") == installed.written(installed.table())


@pytest.mark.slow
def test_a_field_that_another_version_has_is_looked_up_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a PEFT without DoRA and VeRA, read beside the installed one."""
    old = copy.deepcopy(known_fields.table())
    old["adapter"]["version"] = "0.1"
    old["adapter"]["methods"]["lora"].remove("use_dora")
    del old["adapter"]["methods"]["vera"]
    monkeypatch.setattr(known_fields, "table", lambda: old)
    read("adapter.r=4")
    assert known_fields.installed.cache_info().currsize == 0, "asked without need, which takes seconds"
    assert read("adapter=dora").adapter.fields["use_dora"] is True
    assert read("adapter=vera").adapter.method == "vera"
    assert problems("adapter.use_dorra=true")[0].startswith(
        "adapter.use_dorra: lora has no such field; did you mean use_d"
    )
    assert problems("adapter.method=lorra")[0].startswith("adapter.method=lorra: did you mean lora")


def test_a_field_that_another_version_lacks_is_refused_when_the_class_is_built() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.gone: lora of the installed PEFT \(.+\) has no such field"):
        peft_config("lora", {"r": 4, "gone": 1})
    with pytest.raises(ConfigError, match=r"adapter\.method=gone: the installed PEFT \(.+\) has no such method"):
        peft_config("gone", {})
    with pytest.raises(ConfigError, match=r"quantization\.gone: bitsandbytes_4bit of the installed transformers"):
        quantization_config(config.MethodConfig("bitsandbytes_4bit", fields={"gone": 1}), [], torch.float32)
    with pytest.raises(ConfigError, match=r"quantization\.method=gone: the installed transformers"):
        quantization_config(config.MethodConfig("gone"), [], torch.float32)


def test_a_task_without_metrics_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.metrics: is empty"):
        compose.read("train", ["task.metrics=[]"])


def test_what_a_stream_cannot_do_is_refused_together() -> None:
    stream = ["data=hub", "data.train=a/b", "data.validation=a/b:test", "data.streaming=true", "trainer.max_steps=null"]
    unfit = [
        "data.on_duplicate=drop",
        "trainer.share_prefix=on",
        "trainer.save_every=epoch",
        "data.validation_fraction=0.1",
    ]
    found = problems(*stream, *unfit, "data.max_eval_rows=null")
    assert [problem.split(":")[0] for problem in found] == [
        "data.on_duplicate",
        "trainer.share_prefix=on",
        "data.streaming",
        "data.streaming",
        "data.validation_fraction",
        "data.max_eval_rows",
    ]
