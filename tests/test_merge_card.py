"""The model card of a merged folder, and its upload."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tiny
from adapter_runs import drawn_run
from test_merge import merged
from vlmtune import durable
from vlmtune.config import compose
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ConfigError, StorageError
from vlmtune.export import hub
from vlmtune.export.card import _shown
from vlmtune.record.command import command_of
from vlmtune.record.licence import licence_line

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def test_the_card_says_what_it_is_made_of_and_its_code_answers(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = drawn_run(tmp_path / "run", checkpoint_of("llava"), {})
    (run / "result.json").write_text(json.dumps({"metrics": {"eval/exact_match": 0.75, "test/exact_match": None}}))
    table = tiny.write_csv(tmp_path, [("What color?", "Red"), ("How many?", "three")])
    merged(f"run={run}", f"output={tmp_path}/merged", f"data.test={table}")
    folder = tmp_path / "merged"
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["vlmtune", "merge", "lora"]
    for expected in (
        "with the adapter of a run added to its weights",
        "- eval/exact_match: 0.7500",
        "- weights are written in: float32",
        "logits differ by",
        "2 rows of data.test",
        "| as trained | ",
        "| merged | ",
        "On 2 rows, `rows.csv`; fingerprint of the texts: `",
        "python src/merge.py run=run output=merged data.test=rows.csv",
        "The base model's licence is not in the files at hand",
    ):
        assert expected in text, expected
    assert str(tmp_path) not in text
    assert "test/exact_match" not in text
    durable.verify(folder)  # the card is not among the checksums
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"image": tiny.image(), "question": "What color?"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "card", "exec"), names)
    assert isinstance(names["answer"], str)


def test_the_command_of_a_card_starts_the_same_run() -> None:
    words = ["model=auto", "model.path=OWNER/NAME", "adapter=loha", "adapter.r=3", "quantization=int8", "data=csv"]
    more = ["data.train=[a b.csv,c.csv]", "trainer.learning_rate_of={vision: 2e-6}", "task.metrics=[anls]"]
    config, _ = compose.read("train", [*words, *more, "model.system_prompt='say: no'", "data.image_separator=';'"])
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(str(compose.home() / "conf"), version_base="1.3"):  # as inside of a job
        outer = GlobalHydra.instance().hydra
        command_of.__globals__["_usual"].cache_clear()
        command_of(config)
        assert GlobalHydra.instance().hydra is outer
    _, script, *again = shlex.split(command_of(config))
    assert script == "src/train.py"
    assert compose.read("train", again)[0] == config


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ('++run="outputs/mine"', "run=outputs/mine"),
        ('runs=["/home/someone/a b","two"]', "'runs=[\"a b\",two]'"),
        ("++weights=[0.7,0.3]", "'weights=[0.7,0.3]'"),
    ],
)
def test_the_command_of_a_merge_is_as_typed_without_folders(word: str, shown: str) -> None:
    assert _shown(word) == shown


def test_the_licence_is_that_of_the_bases_own_card(tmp_path: Path) -> None:
    model = ModelConfig(path=str(tmp_path))
    assert "is not in the files at hand" in licence_line(model)
    card = tmp_path / "README.md"
    for front, said in (
        ("license: apache-2.0", "licence is apache-2.0, by"),
        ("license: other\nlicense_name: qwen\nlicense_link: https://a.b/c", "licence is qwen (https://a.b/c), by"),
        ("license: other\nlicense_name: qwen\nlicense_link: javascript:1", "licence is qwen, by"),
        ("license: [mit, gpl-3.0]", "licence is mit gpl-3.0, by"),
        ("license: {", "is not in the files at hand"),
        ("tags: a", "is not in the files at hand"),
    ):
        card.write_text(f"---\n{front}\n---\n# A model\n")
        assert said in licence_line(model), front
    assert "https://huggingface.co/OWNER/NAME" in licence_line(ModelConfig(path="OWNER/NAME"))


class Hub:
    """In place of the network: what HfApi is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def create_repo(self, name: str, **options: Any) -> Any:
        self.asked.append((name, options))
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(
            ("files", {**options, "there": sorted(p.name for p in Path(options["folder_path"]).iterdir())})
        )


def test_a_folder_is_uploaded_to_a_private_repository(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = drawn_run(tmp_path / "run", checkpoint_of("qwen2_vl"), {})
    there = Hub()
    monkeypatch.setattr(hub, "client", lambda: there)
    merged(f"run={run}", f"output={tmp_path}/merged", "push_to_hub=mine")
    [(name, options), (_, files)] = there.asked
    assert (name, options["private"]) == ("mine", True)
    assert files["repo_id"] == "someone/mine"
    assert {"README.md", "config.json", "model.safetensors"} <= {*files["there"]}
    monkeypatch.setattr(hub, "client", lambda: Hub(ConnectionError("no way through")))
    with pytest.raises(StorageError, match=r"no way through; .*/other is written; try again: hf upload mine"):
        merged(f"run={run}", f"output={tmp_path}/other", "push_to_hub=mine", "public=true")
    assert (tmp_path / "other" / "README.md").exists()


def test_an_upload_that_cannot_work_is_refused_at_the_start(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = drawn_run(tmp_path / "run", checkpoint_of("qwen2_vl"), {})
    for name, reason in (
        ("a/b/c", "must be OWNER/NAME"),
        ("mine", "push_to_hub=mine: the hub can't be reached|needs a login"),
    ):
        with pytest.raises(ConfigError, match=reason):
            merged(f"run={run}", f"output={tmp_path}/merged", f"push_to_hub={name}")
        assert not (tmp_path / "merged").exists()
