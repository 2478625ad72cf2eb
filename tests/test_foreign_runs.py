"""A run folder may come from somebody else: nothing in it runs code, reads the environment or ends in a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
import vlmtune
from grids import thinned
from vlmtune.config import compose
from vlmtune.config.saved import shipped
from vlmtune.config.strict import strict
from vlmtune.errors import CheckpointError, ConfigError, DataError, VlmtuneError
from vlmtune.record import runfolder

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(*given):\n    return {}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a config and nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    config, _ = compose.read("train", ["data=csv", "data.train=rows.csv", f"hydra.run.dir={folder}"])
    runfolder.write_config(folder / "config.yaml", config)
    return folder


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the module `foreign` was imported."""
    (tmp_path / "foreign.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    return tmp_path / "ran"


def change(run: Path, group: str, **values: Any) -> None:
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[group] |= values
    path.write_text(yaml.safe_dump(config))


FOREIGN = [
    ("task", "metrics", ["exact_match", "foreign.run"]),
    ("task", "metrics", ["foreign.run"]),
    ("task", "metrics", ["cProfile.run"]),
    ("task", "metrics", ["vlmtune.api.load"]),  # ours, and no metric: an answer would be opened as a folder
    ("data", "_target_", "foreign.run"),
    ("data", "_target_", "os.system"),
    ("data", "_target_", "vlmtune.cli.ending.leave"),
    ("model", "fresh", "foreign.run"),
    ("model", "fresh", "shutil.rmtree"),
    ("adapter", "megatron_core", "foreign"),
    ("model", "trust_remote_code", True),
]


@pytest.mark.parametrize(("group", "key", "value"), thinned(FOREIGN, 4))
def test_code_that_a_run_names_is_asked_for_again(run: Path, trap: Path, group: str, key: str, value: Any) -> None:
    """By resume=, by run= and by vlmtune.load, before anything is imported."""
    scripts = value in ("foreign.run", True)  # which read a config as vlmtune.load does
    change(run, group, **{key: value})
    ways = [
        lambda: compose.read("train", [f"resume={run}"]),
        lambda: compose.overlay(compose.compose("evaluate", [f"++run={run}"]), [f"run={run}"]),
        lambda: compose.overlay(compose.compose("predict", [f"++run={run}"]), [f"run={run}"]),
        lambda: vlmtune.load(run),
    ]
    for way in ways if scripts else (ways[0], ways[-1]):
        with pytest.raises(ConfigError) as caught:
            way()
        [problem] = caught.value.problems
        assert str(run / "config.yaml") in problem
        assert f"{group}.{key}=" in problem
    assert not trap.exists()


def test_everything_that_a_run_names_is_one_error(run: Path) -> None:
    change(run, "task", metrics=["foreign.run"])
    change(run, "data", _target_="foreign.run")
    with pytest.raises(ConfigError) as caught:
        compose.saved_config(run, [])
    assert len(caught.value.problems) == 2
    assert "'task.metrics=[foreign.run]'" in caught.value.problems[0]


def test_what_is_asked_for_again_is_used(run: Path, trap: Path) -> None:
    change(run, "task", metrics=["foreign.run"])
    config = strict(compose.saved_config(run, ["task.metrics=[foreign.run]"]))
    assert config.task.metrics == ["foreign.run"]
    assert trap.exists()
    other = strict(compose.saved_config(run, ["task.metrics=[anls]"]))  # or something harmless in its place
    assert other.task.metrics == ["anls"]


def test_our_own_sources_and_models_need_no_asking(run: Path) -> None:
    for key, group in (("_target_", "data"), ("fresh", "model")):
        assert shipped(key)
        for name in shipped(key):
            change(run, group, **{key: name})
            compose.saved_config(run, [])


def test_a_run_does_not_read_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are texts, in typed groups, in open ones and in lists."""
    monkeypatch.setenv("TOKEN", "secret")
    text = "${oc.env:TOKEN} and \\${package:conf} and ${data.train}"
    change(run, "model", system_prompt=text, freeze=[])
    change(run, "task", caption_prompt=text)
    change(run, "adapter", target_modules=[text])
    config = strict(compose.saved_config(run, []))
    assert config.model.system_prompt == config.task.caption_prompt == text
    assert config.adapter.fields["target_modules"] == [text]


def test_a_dollar_sign_in_a_value_survives_the_run_folder(tmp_path: Path) -> None:
    """Typed with Hydra's escape, saved, and read again."""
    config, _ = compose.read(
        "train", ["data=csv", "data.train=x.csv", r"task.caption_prompt='\${price} or ${data.train}'"]
    )
    assert config.task.caption_prompt == "${price} or x.csv"
    runfolder.write_config(tmp_path / "config.yaml", config)
    assert strict(compose.saved_config(tmp_path, [])).task.caption_prompt == "${price} or x.csv"


def test_interpolations_of_the_command_line_still_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "mine.csv")
    assert strict(compose.saved_config(run, ["data.test=${oc.env:DATA}"])).data.test == "mine.csv"


BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    thinned(
        [
            b"",
            b"[1, 2]",
            b"- task\n- data\n",
            b"task: !!python/object/apply:os.system ['touch ran']\n",
            b"task: !!python/name:os.system\n",
            b"task: {metrics: [a]\n",
            b"task: 1\ntask: 2\n",
            b"\xff\xfe\x00\x00",
            b"\x00\x01",
            b"[" * 5000,
            BOMB.encode(),
            b"task: *nobody\n",
        ],
        4,
    ),
    ids=lambda content: repr(content[:24]),
)
def test_a_config_that_no_run_wrote_is_one_sentence(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        compose.saved_config(run, [])
    assert str(run / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"data: 5\n", b"task: {metrics: {a.b: c.d}}\n", b"model.trust_remote_code: true\n"]
)
def test_a_config_of_other_form_is_refused(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(VlmtuneError):
        strict(compose.saved_config(run, ["data.test=x.csv"]))


def test_a_script_answers_without_a_traceback(run: Path, tmp_path: Path) -> None:
    change(run, "task", metrics=["cProfile.run"])
    done = subprocess.run(
        [sys.executable, "src/evaluate.py", f"run={run}", "data.test=x.csv"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cProfile.run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"adapter_config.json": "{}", "adapter_model.bin": "x"}, "safetensors"),
        ({"adapter_config.json": "{}"}, "has no adapter_model.safetensors"),
        (
            {"adapter_config.json": json.dumps({"megatron_core": "foreign"}), "adapter_model.safetensors": "x"},
            "megatron_core=foreign",
        ),
    ],
)
def test_an_adapter_folder_runs_no_code(tmp_path: Path, trap: Path, files: dict[str, str], expected: str) -> None:
    from vlmtune.models.saved_adapter import load_adapter

    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=expected):
        load_adapter(None, tmp_path)
    assert not trap.exists()


def test_a_chat_template_runs_in_a_sandbox(checkpoint_of: Any) -> None:
    """It comes with the checkpoint."""
    from vlmtune.config.schema import ModelConfig
    from vlmtune.prompt.encode import Encoder
    from vlmtune.prompt.processors import load_processor

    processor = load_processor(ModelConfig(path=str(checkpoint_of("qwen2_vl"))))
    processor.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(VlmtuneError, match="unsafe"):
        Encoder(processor).encode([tiny.record()], answered=True)


def test_the_report_shows_foreign_text_as_text(tmp_path: Path) -> None:
    from vlmtune.record.report import write

    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    result = {"metrics": {f"eval/{evil}": 0.5}, "error": None, "status": evil}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"columns": {"question": "q"}}, "evil": evil}))
    table = {"q": [evil], "answer": [evil], "answer_predictions": [evil], "score": [0.0]}
    pd = pytest.importorskip("pandas")
    pd.DataFrame(table).to_csv(tmp_path / "predictions.csv", index=False)
    page = write(tmp_path, result).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    "named", ["https://example.org/x.csv", "/etc/passwd.csv", "../private/*.csv", "{train: [hf://datasets/a/b/x.csv]}"]
)
def test_a_data_sets_page_reaches_no_further_than_its_folder(tmp_path: Path, named: str) -> None:
    from vlmtune.data.sources import hub

    page = f"---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n# Data\n"
    (tmp_path / "README.md").write_text(page)
    with pytest.raises(DataError, match=r"names files outside the folder: .*csv"):
        hub._open(str(tmp_path), "train", None)


def test_a_data_sets_page_may_name_files_in_its_folder(tmp_path: Path) -> None:
    from vlmtune.data.sources import hub

    inside = "[{split: train, path: 'data/train-*.csv'}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: {inside}\n  data_dir: data\n---\n")
    assert hub.files_outside(tmp_path) == []


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl"])
def test_a_resumed_run_writes_through_no_link(tmp_path: Path, name: str) -> None:
    from vlmtune.config import saved

    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="symbolic link"):
        saved.refuse_links(tmp_path / "run")
