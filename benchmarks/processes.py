"""What a second process gains on a CPU: `python benchmarks/processes.py`.

The same steps by one process with all cores and by two with half of them each, in turn, on pico (LoRA) and its images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "src" / "train.py"
COUNTS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=32, help="per step, over all processes")
    options = parser.parse_args()
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(options.rounds):
        for count in COUNTS:
            rates[count].append(once(count, options.steps, options.rows))
    middle = {count: statistics.median(found) for count, found in rates.items()}
    for count, found in rates.items():
        print(f"{count} process(es): median {middle[count]:.0f} rows/s, from {min(found):.0f} to {max(found):.0f}")
    print(f"ratio of the medians: {middle[2] / middle[1]:.2f}")


def once(processes: int, steps: int, rows: int) -> float:
    """Rows per second of the steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        size = [f"trainer.rows_per_step={rows}", f"trainer.batch_size={rows // max(COUNTS)}"]
        length = [f"trainer.max_steps={steps}", "trainer.eval_baseline=false", "trainer.eval_every=null"]
        fewer = ["data.max_eval_rows=8", "trainer.save_every=null", "tracker=none", f"hydra.run.dir={folder}/run"]
        several = ["backend=accelerate", f"backend.num_processes={processes}"]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, str(TRAIN), *size, *length, *fewer, *several]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        speed = json.loads(Path(folder, "run", "result.json").read_text())["speed"]
        return float(speed["examples_per_second"])


if __name__ == "__main__":
    main()
