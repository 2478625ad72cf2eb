"""How vlmtune's speed and memory go with the work: `python benchmarks/scaling.py`.

LoRA in fp32 on rows seen once, one thing varied at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import work

HERE = Path(__file__).parent
USUAL = {"side": 224, "questions": 1, "batch": 8, "layers": 4}
CURVES = {
    "side": [112, 224, 448],
    "questions": [1, 2, 4, 8],
    "batch": [2, 8, 32],
    "layers": [2, 4, 8],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=320)
    options = parser.parse_args()
    print("| varied | image tokens | questions an image | batch | layers | rows/s | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for name, values in CURVES.items():
        for value in values:
            setting = {**USUAL, name: value}
            runs = [once(setting, options.rows) for _ in range(options.rounds)]
            rate, peak = (
                statistics.median(run[key] for run in runs) for key in ("rows_per_second", "peak_rss_megabytes")
            )
            tokens = (setting["side"] // 28) ** 2
            cells = f"{tokens} | {setting['questions']} | {setting['batch']} | {setting['layers']}"
            print(f"| {name} | {cells} | {rate:.1f} | {peak:.0f} |", flush=True)


def once(setting: dict[str, int], rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        work.write_model(Path(folder, "model"), setting["side"], setting["layers"])
        work.write_table(Path(folder, "one.csv"), rows, setting["questions"])
        command = [sys.executable, str(HERE / "contender.py"), "vlmtune", folder, "--batch", str(setting["batch"])]
        command += ["--steps", str(max(rows // setting["batch"], 8))]
        environment = {**os.environ, "BENCH_STARTED": str(time.time())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return result


if __name__ == "__main__":
    main()
