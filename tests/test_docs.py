"""The documentation says what the program does: commands compose, links lead somewhere, tables are complete."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmtune.cli import chat, compare, merge, plan
from vlmtune.config import compose
from vlmtune.config import fields as known_fields
from vlmtune.config import schema as config
from vlmtune.launch.world import World

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_COMMANDS = {"source", "mkdir"}
OVERRIDE = re.compile(r"[a-z_.]+=[^=\s]+")
LUDWIGS_OWN = ("skip_save_processed_input=True",)
OWN_DATA = "Your own data in five minutes"
LUDWIG_KEYS = """
model_type base_model is_multimodal trust_remote_code input_features output_features preprocessing adapter r alpha
dropout target_modules trainer type epochs batch_size gradient_accumulation_steps learning_rate
learning_rate_scheduler decay warmup_fraction quantization bits quantization_type compute_dtype generation
max_new_tokens temperature backend num_workers use_gpu resources_per_worker --config --dataset --output_directory
output_directory skip_save_processed_input load predict answer_predictions image_path question answer merge
"""


def blocks(page: Path, language: str, section: str = "") -> list[str]:
    """The fenced blocks of a language on a page, or in the section of that title."""
    text = page.read_text(encoding="utf-8")
    if section:
        text = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[tuple[list[str], str]]:
    """The words of each command of a bash block, and the text of its here-document."""
    lines = iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        words = shlex.split(line, comments=True)
        document = []
        if words and words[-1].startswith("<<"):
            end = words.pop().lstrip("<")
            while (inner := next(lines)) != end:
                document.append(inner)
        if words:
            yield words, "\n".join(document)


def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


ALL_COMMANDS = [
    pytest.param(words, document, id=" ".join(words)[:80])
    for page in PAGES
    for block in blocks(page, "bash")
    for words, document in commands(block)
]
ALL_PYTHON = [pytest.param(block, id=page.name) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("words", "document"), ALL_COMMANDS)
def test_every_command_is_one_that_works(
    words: list[str], document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed key, option, script or make target leaves no dead command behind. Nothing is trained."""
    monkeypatch.chdir(tmp_path)
    script = next((word for word in words if word.startswith("src/")), None)
    if words[0] == "make":
        assert words[1] in make_targets()
    elif words[:2] == ["python", "-"]:
        compile(document, "here-document", "exec")
    elif script:
        assert (ROOT / script).is_file()
        check_overrides(Path(script).stem, words[words.index(script) + 1 :])
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        check_overrides("train", words[3:])
    elif words[:2] == ["wandb", "sweep"]:
        assert (ROOT / words[2]).is_file()
    elif words[:2] == ["wandb", "agent"]:
        assert words[2:] == ["ENTITY/PROJECT/ID"]
    elif "vlmtune" in words[:-1]:  # the installed command, or -m vlmtune behind python or a launcher
        check_overrides(words[words.index("vlmtune") + 1], words[words.index("vlmtune") + 2 :])
    else:
        assert words[0] in OTHER_COMMANDS, f"nothing checks the command {words[0]}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_overrides(command: str, words: list[str]) -> None:
    """Read the config that a script would be given, with a run folder in place of the one that the command names."""
    for word in words:
        if word.startswith(("run=", "resume=", "adapter.from=")):
            write_run(Path(word.split("=", 1)[1]))
        elif word.startswith("runs="):
            for name in word.removeprefix("runs=").strip("[]").split(","):
                write_run(Path(name))
        elif word.startswith("gguf="):
            Path(word.removeprefix("gguf=")).parent.mkdir(parents=True)
            Path(word.removeprefix("gguf=")).touch()
    overrides = [word for word in words if word != "-m"]
    if command == "train":
        compose.read(command, overrides, multirun="-m" in words)
    elif command == "compare":
        folders = ",".join(word for word in overrides if "=" not in word)
        compare.check([f"runs=[{folders}]", *(word for word in overrides if "=" in word)], False, World())
    elif command in ("chat", "merge", "plan"):
        {"chat": chat, "merge": merge, "plan": plan}[command].check(overrides, False, World())
    else:
        compose.overlay(compose.compose(command, compose.normalise(overrides)[0]), overrides)


def write_run(folder: Path) -> None:
    found, _ = compose.read("train", [])
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    (folder / "config.yaml").write_text(yaml.safe_dump(config.plain(found)))


@pytest.mark.parametrize("block", ALL_PYTHON)
def test_python_blocks_compile_and_call_what_exists(block: str) -> None:
    import vlmtune

    compile(block, "block", "exec")
    for name in re.findall(r"\bvlmtune\.(\w+)\(", block):
        assert callable(getattr(vlmtune, name))
    for overrides in re.findall(r"vlmtune\.train\(\[(.*?)\]\)", block, re.DOTALL):
        compose.read("train", [word.strip(' "\n') for word in overrides.split(",") if word.strip()])


@pytest.mark.parametrize("page", named([ROOT / "README.md", ROOT / "docs/ludwig.md", ROOT / "docs/architecture.md"]))
def test_keys_in_running_text_exist(page: Path) -> None:
    """`trainer.epochs=3` in a sentence or a table is as good as in a command; `...` and FOLDER stand for a value."""
    problems = []
    for span in spans(page):
        words = span.split()
        if span in LUDWIGS_OWN or not all(map(OVERRIDE.fullmatch, words)):
            continue
        overrides = [word.replace("=...", "=null") for word in words if not word.startswith("experiment=")]
        found = compose.normalise(overrides)
        problems += found[1] or unknown(found[0])
    problems += [span for span in spans(page) if is_key(span) and not key_exists(span)]
    assert problems == []


def unknown(overrides: list[str]) -> list[str]:
    """Keys that no schema has; values and combinations are not looked at, since a sentence leaves out their context."""
    keys = [override.lstrip("+").split("=")[0] for override in overrides]
    return [key for key in keys if is_key(key) and not key_exists(key)]


def is_key(span: str) -> bool:
    is_module = (ROOT / "src" / "vlmtune" / (span.replace(".", "/") + ".py")).exists()
    return bool(re.fullmatch(r"[a-z]+(\.[a-z_0-9]+)+", span)) and span.split(".")[0] in config.SCHEMA and not is_module


def key_exists(key: str) -> bool:
    group, *rest = key.split(".")
    if group in config.OPEN_GROUPS:
        known = {field for fields in known_fields.known(group).values() for field in fields}
        return rest[0] in known | {"method", "parts", *(["from"] if group == "adapter" else [])}
    schema = config.nested_schema(config.SCHEMA[group])
    for name in rest:
        field = next((f for f in dataclasses.fields(schema) if f.name == name), None) if schema else None
        if field is None:
            return False
        schema = config.nested_schema(field)
    return True


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def test_the_architecture_names_every_module() -> None:
    source = ROOT / "src" / "vlmtune"
    modules = {".".join(path.relative_to(source).with_suffix("").parts) for path in source.rglob("*.py")}
    named = set(spans(ROOT / "docs" / "architecture.md"))
    assert sorted(name for name in modules - named if not name.endswith("__init__")) == []


def test_the_readme_lists_every_group_and_option() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+` ?)+)\|", text, re.MULTILINE)
    listed = {group: re.findall(r"`(\w+)`", options) for group, options in rows}
    groups = {group: options for group, options in compose.groups().items() if group not in ("sweeps", "experiment")}
    assert listed == groups


def test_the_readmes_first_config_is_the_file_that_it_names() -> None:
    [block] = blocks(ROOT / "README.md", "yaml")
    assert block == (ROOT / "conf" / "experiment" / "one_gpu.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", named([page for page in PAGES if page.name != "config.md"]))
def test_lines_are_wrapped(page: Path) -> None:
    """At 120 characters; tables, code and figures of a measurement, which are indented, keep their own shape."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]
    assert long == []


def test_each_key_of_ludwigs_guide_is_in_the_tables() -> None:
    text = " ".join(spans(ROOT / "docs" / "ludwig.md"))
    assert [key for key in LUDWIG_KEYS.split() if not re.search(rf"(?<![\w-]){re.escape(key)}\b", text)] == []


def test_ludwigs_example_is_the_same_run_as_a_command_and_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "ludwig.md"
    [[words, _]] = [command for block in blocks(page, "bash") for command in commands(block)]
    from_command, _ = compose.read("train", words[2:])
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    (tmp_path / "conf" / "experiment").mkdir(exist_ok=True)
    (tmp_path / "conf" / "experiment" / "my_vqa.yaml").write_text(blocks(page, "yaml")[0])
    monkeypatch.setattr(compose, "home", lambda: tmp_path)
    compose.groups.cache_clear()
    try:
        from_file, _ = compose.read("train", ["experiment=my_vqa"])
    finally:
        compose.groups.cache_clear()
    assert from_file == from_command


def test_the_page_of_keys_is_up_to_date() -> None:
    """After a change in config.py or in a group's default file: python docs/make_config.py."""
    page = runpy.run_path(str(ROOT / "docs" / "make_config.py"))["page"]
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page(), "run python docs/make_config.py"


@pytest.mark.slow
def test_the_section_on_own_data_runs(tmp_path: Path) -> None:
    """Exactly the blocks of the README, in their order, in an empty folder."""
    for name in ("src", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    here = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, here))}
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {OWN_DATA}\n", 1)[1].split("\n## ", 1)[0]
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        block = block.removeprefix("source .venv/bin/activate\n")
        shell = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, textwrap.shorten(block, 200) + done.stdout[-2000:] + done.stderr[-2000:]
    answers = (tmp_path / "my_data" / "answers.csv").read_text().splitlines()
    assert len(answers) == 101
    assert answers[0] == "image_path,question,answer,answer_predictions"
    for name in ("model", "predictions.csv", "report.html", "result.json", "metrics.jsonl", "train.log", "config.yaml"):
        assert (tmp_path / "outputs" / "mine" / name).exists()
