"""Installed from a wheel, without a checkout, `vlmtune` does what the scripts in `src/` do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pandas as pd
import pytest

import tiny
from vlmtune.config.schema import home

SHORT = ("tracker=none", "trainer.max_steps=2", "trainer.batch_size=2", "generation.max_new_tokens=2")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=home(), check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    return file


def test_the_wheel_holds_all_that_a_run_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for folder in ("conf", "sweeps") for file in (home() / folder).rglob("*.yaml")]
    assert {f"vlmtune/{file.relative_to(home())}" for file in files} <= names
    package = home() / "src" / "vlmtune"
    own = {f"vlmtune/{file.relative_to(package)}" for file in package.rglob("*") if file.is_file()}
    assert {name for name in own - names if "__pycache__" not in name} == set()
    assert {"vlmtune/record/report.html.j2", "vlmtune/models/pico_weights/model.safetensors"} <= names
    assert "hydra_plugins/vlmtune_launcher.py" in names
    assert "hydra_plugins/__init__.py" not in names, "other packages have plugins in this folder too"
    assert [name for name in names if name.startswith(("src/", "tests/", "outputs/"))] == []


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment with the wheel in it.

    Shared with the environment of the tests are the packages that vlmtune depends on: they are found through a .pth
    file, which brings no editable install along. Whether pip would choose versions that work is not tested here.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    [packages] = folder.glob("lib/*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*words: str | Path, folder: Path) -> str:
    """What a command prints, started in `folder` as from a new shell."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["status"])


@pytest.mark.slow
def test_the_installed_command_trains_sweeps_predicts_and_evaluates(installed: Path, tmp_path: Path) -> None:
    vlmtune, here = installed / "vlmtune", tmp_path / "empty"
    here.mkdir()
    table = tiny.write_csv(tmp_path, [(f"number {i}?", "red") for i in range(12)], per_image=3)
    data = ("data=csv", f"data.train={table}")

    where = run(installed / "python", "-c", "import vlmtune; print(vlmtune.__file__)", folder=here)
    assert Path(where).is_relative_to(installed.parent)
    assert "vlmtune train -m adapter.r=4,8,16" in run(vlmtune, "train", "--help", folder=here)
    assert "adapter.r: 4,8,16,32" in run(vlmtune, "train", "sweeps=lora_rank", "--cfg", "hydra", folder=here)
    assert list(here.iterdir()) == []

    run(vlmtune, "train", *data, *SHORT, folder=here)
    [trained] = (here / "outputs" / "runs").iterdir()
    assert status(trained) == "completed"
    run(vlmtune, "train", "-m", "adapter.r=2,4", *data, *SHORT, folder=here)
    [sweep] = (here / "outputs" / "sweeps" / "adapter.r").iterdir()
    assert [status(sweep / number) for number in ("0", "1")] == ["completed", "completed"]

    run(vlmtune, "predict", f"run={trained}", f"data.test={table}", "output=answers.csv", folder=here)
    answers = pd.read_csv(here / "answers.csv")
    assert (len(answers), "answer_predictions" in answers) == (12, True)
    assert "12 test rows" in run(vlmtune, "evaluate", f"run={trained}", f"data.test={table}", folder=here)


@pytest.mark.slow
def test_a_launcher_starts_the_installed_module(installed: Path, tmp_path: Path) -> None:
    table = tiny.write_csv(tmp_path, [(f"number {i}?", "red") for i in range(12)], per_image=3)
    launch = (installed / "python", "-m", "torch.distributed.run", "--nproc_per_node", "2")
    words = ("data=csv", f"data.train={table}", *SHORT, "hydra.run.dir=run")
    run(*launch, "-m", "vlmtune", "train", *words, folder=tmp_path)
    assert status(tmp_path / "run") == "completed"


WITHOUT_EXTRAS = """
import sys
from vlmtune.errors import EXTRAS
sys.modules.update(dict.fromkeys(EXTRAS))  # as if none was installed
from vlmtune.cli.main import main
main()
"""


@pytest.mark.slow
def test_the_default_run_needs_no_extra(installed: Path, tmp_path: Path) -> None:
    words = (*SHORT, "data.max_eval_rows=2", "hydra.run.dir=run")
    run(installed / "python", "-c", WITHOUT_EXTRAS, "train", *words, folder=tmp_path)
    assert status(tmp_path / "run") == "completed"
