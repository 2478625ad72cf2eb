"""One training run of gpu.py, in a process of its own: `python benchmarks/gpu_run.py CONTENDER FOLDER CASE`.

CASE is the JSON of a `gpu.Case`. Prints the phases as they begin, and the figures at the end; `--machine` prints what
this machine has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_work import text_tokens
from meter import Meter, say

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "pydantic": "pydantic",
    "PIL": "pillow",
    "jinja2": "jinja2",
    "rich": "rich",
    "pandas": "pandas",
    "trl": "trl",
    "datasets": "datasets",
}
"""Modules that rows need, and the packages that bring them."""
WARM_UP = 3
"""Steps that are not counted."""


def main() -> None:
    if sys.argv[1] == "--machine":
        say(**machine())
        return
    name, folder, case = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    meter = Meter()
    meter.enter("load")
    try:
        losses = trained(name, folder, case, meter)
    except Exception as error:
        traceback.print_exc()
        say(failed=meter.phase, why=reason(error))
        sys.exit(1)
    say(**figures(meter, losses), text_tokens=text_tokens(folder / "model"))


def machine() -> dict[str, Any]:
    """The device, its memory in bytes, and the versions of the packages that are here."""
    versions = {}
    for module, package in PACKAGES.items():
        try:
            versions[module] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not torch.cuda.is_available():
        return {"device": "CPU", "cuda": False, "versions": versions}
    total = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(0), "cuda": True, "memory": total, "versions": versions}


def trained(name: str, folder: Path, case: dict[str, Any], meter: Meter) -> list[float]:
    """Train as `case` says; the loss of each step."""
    import contender

    use_cpu = not torch.cuda.is_available()
    options = argparse.Namespace(
        folder=folder,
        table="rows",
        mode="full" if case["weights"] == "all" else "lora",
        precision="fp32" if use_cpu else "bf16",
        quantized=case["weights"] == "nf4",
        use_cpu=use_cpu,
        grouped=case["questions"] > 1 and "trainer.share_prefix=off" not in case["words"],
        **{key: case[key] for key in ("steps", "batch", "accumulation", "checkpointing", "rank", "targets")},
        **{key: case[key] for key in ("evaluated", "workers")},
    )
    if name != "vlmtune":
        return contender.CONTENDERS[name](options, meter)
    words = ["tracker=none", "trainer.save_every=null", *case["words"]]
    if options.mode == "full" and not use_cpu:
        words += ["model.dtype=bf16", "optimizer=adamw_8bit"]
    if options.evaluated:
        words += [f"data.validation={folder / 'rows.csv'}", f"data.max_eval_rows={options.evaluated}"]
        words += ["generation.max_new_tokens=8"]
    return contender.with_vlmtune(options, meter, words)


def reason(error: BaseException) -> str:
    """`out of memory`, or the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or "out of device memory" in str(cause):
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def figures(meter: Meter, losses: list[float]) -> dict[str, Any]:
    """Of the steps after the warm-up; memory in bytes."""
    (first, _), (last, _) = meter.times[WARM_UP - 1], meter.times[-1]
    seconds = last - first
    return {
        "rows_per_second": sum(rows for _, rows in meter.times[WARM_UP:]) / seconds,
        "data_wait_share": (meter.waits[-1] - meter.waits[WARM_UP - 1]) / seconds,
        "start_allocated": meter.peak("allocated", "load", "start-up"),
        "allocated": meter.peak("allocated", "first step", "training"),
        "reserved": meter.peak("reserved", "first step", "training"),
        "start_driver": meter.peak("driver", "load", "start-up"),
        "driver": meter.peak("driver", "first step", "training"),
        "evaluation_allocated": meter.peak("allocated", "evaluation"),
        "evaluation_driver": meter.peak("driver", "evaluation"),
        "losses": losses,
    }


if __name__ == "__main__":
    main()
