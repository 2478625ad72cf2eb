"""GGUF files for llama.cpp, made by llama.cpp's own converter where the user has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from vlmtune import durable
from vlmtune.errors import ModelError

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LINES = 6
"""Of what the converter said last that an error shows."""


def convert(folder: Path, converter: str, dtype: torch.dtype) -> list[Path]:
    """Write `folder`/gguf: the language model in `dtype`, and the vision side as mmproj, in f16 or f32.

    `converter`: llama.cpp's convert_hf_to_gguf.py. Raises ModelError with what it said where it fails.
    """
    script = Path(converter).expanduser()
    half = "f32" if dtype == torch.float32 else "f16"
    with durable.whole(folder / "gguf") as partial:
        for name, options in (
            ("model.gguf", ["--outtype", TYPES[dtype]]),
            ("mmproj-model.gguf", ["--outtype", half, "--mmproj"]),
        ):
            words = [sys.executable, str(script), str(folder), "--outfile", str(partial / name), *options]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not (partial / name).is_file():
                said = (done.stderr or done.stdout).strip().splitlines()[-LINES:]
                raise ModelError(
                    f"gguf={converter}: wrote no {name} (exit code {done.returncode}); {folder} itself is written. It "
                    f"said: {' | '.join(said) or 'nothing'}"
                )
    return sorted((folder / "gguf").glob("*.gguf"))
