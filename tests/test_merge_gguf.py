"""GGUF by llama.cpp's converter, for which a script stands in that checks how it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmtune.errors import ModelError
from vlmtune.export import gguf
from vlmtune.export.options import Options, problems_of

CONVERTER = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
parser.add_argument("--mmproj", action="store_true")
words = parser.parse_args()
if not (words.model / "config.json").exists():
    sys.exit("Model Foo is not supported")
words.outfile.write_text(f"{words.outtype} {words.mmproj}")
"""


def test_both_files_are_written_and_an_error_is_shown(tmp_path: Path) -> None:
    script, folder = tmp_path / "a converter; touch x.py", tmp_path / "merged"
    script.write_text(CONVERTER)
    folder.mkdir()
    with pytest.raises(ModelError, match=r"wrote no model.gguf \(exit code 1\).*is written. It said: Model Foo is not"):
        gguf.convert(folder, str(script), torch.bfloat16)
    assert [*folder.iterdir()] == []
    (folder / "config.json").touch()
    assert [path.name for path in gguf.convert(folder, str(script), torch.bfloat16)] == [
        "mmproj-model.gguf",
        "model.gguf",
    ]
    assert (folder / "gguf" / "model.gguf").read_text() == "bf16 False"
    assert (folder / "gguf" / "mmproj-model.gguf").read_text() == "f16 True"


def test_a_converter_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    options = Options(run="a", output="b", gguf=str(tmp_path / "none.py"))
    [problem] = problems_of(options, has_data=False)
    assert "no such file; give the path of llama.cpp's convert_hf_to_gguf.py" in problem
