"""The planner's prediction against the measured peak, on a CPU: `python benchmarks/planner.py`.

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
WIDE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "num_attention_heads": 10}
"""The language model of each family: 14 layers, so that the prediction is extrapolated."""
LORA = ["adapter=lora", "adapter.r=16"]
ALL = ["adapter=none", "trainer.learning_rate=1e-5"]
CHECKPOINTING = "trainer.gradient_checkpointing=true"
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "Qwen2-VL, LoRA, 16 rows": ("qwen2_vl", [*LORA, "trainer.batch_size=16"]),
    "Qwen2-VL, LoRA, 48 rows": ("qwen2_vl", [*LORA, "trainer.batch_size=48"]),
    "Qwen2-VL, LoRA, 48 rows, recomputed": ("qwen2_vl", [*LORA, "trainer.batch_size=48", CHECKPOINTING]),
    "Qwen2-VL, all weights, 8 rows": ("qwen2_vl", [*ALL, "trainer.batch_size=8"]),
    "LLaVA, LoRA, 48 rows": ("llava", [*LORA, "trainer.batch_size=48"]),
    "LLaVA, LoRA, 48 rows, plain forms": ("llava", [*LORA, "trainer.batch_size=48", "model.rewrites=off"]),
    "LLaVA, all weights, 8 rows": ("llava", [*ALL, "trainer.batch_size=8"]),
    "LLaVA, all weights, bf16, update in the backward pass": (
        "llava",
        [
            *ALL,
            "trainer.batch_size=8",
            "model.dtype=bf16",
            "optimizer.step_in_backward=true",
            "trainer.max_grad_norm=null",
        ],
    ),
    "InternVL, LoRA, 32 rows": ("internvl", [*LORA, "trainer.batch_size=32"]),
    "InternVL, all weights, 8 rows, recomputed": ("internvl", [*ALL, "trainer.batch_size=8", CHECKPOINTING]),
}
COMMON = [
    *("model=auto", "data=csv", "trainer.max_steps=3", "tracker=none", "trainer.save_every=null"),
    *("data.cache_features=off", "trainer.num_workers=0", "trainer.share_prefix=off", "trainer.eval_every=null"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options = parser.parse_args()
    print("| setting | predicted, MB | measured, MB | error |\n|---|---|---|---|", flush=True)
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.settings:
            predicted, measured = run(*SETTINGS[name], Path(folder))
            errors.append(predicted / measured - 1)
            print(f"| {name} | {predicted / 1e6:.0f} | {measured / 1e6:.0f} | {errors[-1]:+.0%} |", flush=True)
    print(f"\nlargest error {max(map(abs, errors)):.0%}, mean {sum(map(abs, errors)) / len(errors):.0%}")


def run(family: str, words: list[str], folder: Path) -> tuple[int, int]:
    """Predicted and measured bytes of a run."""
    import tiny

    model, table = folder / family, folder / "rows.csv"
    if not model.exists():
        tiny.TEXT.update(WIDE)
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
