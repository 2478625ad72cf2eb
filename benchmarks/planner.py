"""The planner's prediction against the measured peak, on a CPU: `python benchmarks/planner.py`.

`--guide` prints Ludwig's table of memory with the planner's beside it, for docs/planner.md.

Models of three families with random weights (0.1 to 0.4 GB in float32) train a few steps, each in a process of its
own. Measured is the peak of resident memory over that before the model was opened; predicted is what the run itself
logs. Without evaluation, cached features and worker processes, which the prediction does not cover.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]
WIDE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "num_attention_heads": 40}
"""The language model of each family: 14 layers, so that the prediction is extrapolated."""
LORA = ["adapter=lora", "adapter.r=16"]
ALL = ["adapter=none", "trainer.learning_rate=1e-5"]
IN_BACKWARD = ["model.dtype=bf16", "optimizer.step_in_backward=true", "trainer.max_grad_norm=null"]
CHECKPOINTING = "trainer.gradient_checkpointing=true"
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "Qwen2-VL, LoRA, 16 rows": ("qwen2_vl", [*LORA, "trainer.batch_size=16"]),
    "Qwen2-VL, LoRA, 48 rows": ("qwen2_vl", [*LORA, "trainer.batch_size=48"]),
    "Qwen2-VL, LoRA, 48 rows, recomputed": ("qwen2_vl", [*LORA, "trainer.batch_size=48", CHECKPOINTING]),
    "Qwen2-VL, all weights, 8 rows": ("qwen2_vl", [*ALL, "trainer.batch_size=8"]),
    "LLaVA, LoRA, 48 rows": ("llava", [*LORA, "trainer.batch_size=48"]),
    "LLaVA, LoRA, 48 rows, plain forms": ("llava", [*LORA, "trainer.batch_size=48", "model.rewrites=off"]),
    "LLaVA, all weights, 8 rows": ("llava", [*ALL, "trainer.batch_size=8"]),
    "LLaVA, all weights, bf16, update in the backward pass": ("llava", [*ALL, "trainer.batch_size=8", *IN_BACKWARD]),
    "InternVL, LoRA, 32 rows": ("internvl", [*LORA, "trainer.batch_size=32"]),
    "InternVL, all weights, 8 rows, recomputed": ("internvl", [*ALL, "trainer.batch_size=8", CHECKPOINTING]),
}
RECOMPUTED = [CHECKPOINTING, "trainer.batch_size=1"]
KEPT = ["trainer.batch_size=1"]
QLORA = ["adapter=lora", "quantization=nf4"]
FULL = ["model=qwen2vl_7b", "adapter=none", "model.dtype=bf16", "optimizer=adamw_8bit"]
GUIDE = {
    "7B QLoRA": (
        16,
        {"recomputed": ["model=qwen2vl_7b", *QLORA, *RECOMPUTED], "kept": ["model=qwen2vl_7b", *QLORA, *KEPT]},
    ),
    "7B, all weights": (
        48,
        {
            "bf16, 8-bit optimizer, recomputed": [*FULL, *RECOMPUTED],
            "the same, updates in the backward pass": [*FULL, *RECOMPUTED, *IN_BACKWARD[1:]],
        },
    ),
    "72B QLoRA": (80, {"recomputed": ["model=qwen2vl_72b", *QLORA, *RECOMPUTED]}),
}
"""The guide's settings and GB, and what they may mean here; one row of 1,340 tokens at a time."""
COMMON = [
    *("model=auto", "data=csv", "trainer.max_steps=3", "tracker=none", "trainer.save_every=null"),
    *("data.cache_features=off", "trainer.num_workers=0", "trainer.share_prefix=off", "trainer.eval_every=null"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--guide", action="store_true", help="print the guide's table of memory")
    options = parser.parse_args()
    if options.guide:
        guide()
        return
    print("| setting | predicted, MB | measured, MB | error |\n|---|---|---|---|", flush=True)
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.settings:
            predicted, measured = run(*SETTINGS[name], Path(folder))
            errors.append(predicted / measured - 1)
            print(f"| {name} | {predicted / 1e6:.0f} | {measured / 1e6:.0f} | {errors[-1]:+.0%} |", flush=True)
    print(f"\nlargest error {max(map(abs, errors)):.0%}, mean {sum(map(abs, errors)) / len(errors):.0%}")


def guide() -> None:
    """The guide's figures and the planner's, in Markdown."""
    from vlmtune.config import compose
    from vlmtune.planning.architecture import architecture_of
    from vlmtune.planning.estimate import Plan
    from vlmtune.planning.rows import Row, assumed

    columns = "setting", "the guide, GB", "here", "weights and adapter", "optimizer", "a step", "sum, GB"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name, (stated, ours) in GUIDE.items():
        for how, words in ours.items():
            config, _ = compose.read("train", words)
            architecture = architecture_of(config.model)
            found = Plan(architecture, lambda _, a=architecture: assumed(a, Row(1280))).of(config)
            sums = [found.kept, found.state, found.step, found.total]
            print(f"| {name} | {stated} | {how} | {' | '.join(f'{each / 1e9:.1f}' for each in sums)} |", flush=True)


def run(family: str, words: list[str], folder: Path) -> tuple[int, int]:
    """Predicted and measured bytes of a run."""
    import tiny

    model, table = folder / family, folder / "rows.csv"
    if not model.exists():
        tiny.TEXT.update(WIDE, num_key_value_heads=20)
        tiny.build(family, model)
    if not table.exists():
        tiny.write_csv(folder, [("How many circles are there in the picture?", "three small circles")] * 192)
    place = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, str(HERE.parent / "src" / "train.py"), *COMMON, f"model.path={model}", *words]
    command += [f"data.train={table}", f"hydra.run.dir={place}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    memory: dict[str, Any] = json.loads((place / "result.json").read_text())["memory"]
    if "predicted_bytes" not in memory:
        sys.exit((place / "train.log").read_text())
    return memory["predicted_bytes"], memory["peak_rss_bytes"] - memory["before_model_rss_bytes"]


if __name__ == "__main__":
    main()
