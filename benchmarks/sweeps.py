"""What a trial of a sweep costs beyond the plain command's work, and whether it grows: `python benchmarks/sweeps.py`.

A run's work lasts from its config.yaml, written before it reads its rows, to its result.json, the last of its files.
What a sweep adds is what lies between one trial's result.json and the next one's config.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "src" / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    size = ["trainer.batch_size=8", f"trainer.max_steps={options.steps}", "data.max_eval_rows=8", "tracker=none"]
    with tempfile.TemporaryDirectory() as folder:
        plain = timed([*size, f"hydra.run.dir={folder}/plain"])
        plain_work = work(Path(folder, "plain"))
        seeds = f"trainer.seed=range({options.trials})"
        whole = timed(["-m", *size, seeds, f"hydra.sweep.dir={folder}/sweep"])
        runs = [Path(folder, "sweep", str(number)) for number in range(options.trials)]
        works = [work(run) for run in runs]
        peaks = [json.loads((run / "result.json").read_text())["memory"]["peak_rss_bytes"] / 1e6 for run in runs]
        spans = between_trials(runs)
    print(f"plain command: {plain:.1f} s, of which work {plain_work:.1f} s")
    print(f"sweep of {options.trials}: {whole:.1f} s; work of a trial: median {statistics.median(works):.1f} s")
    print(f"between two trials: median {statistics.median(spans):.2f} s, ", end="")
    print(f"from {min(spans):.2f} to {max(spans):.2f}")
    print(f"peak memory: first {peaks[0]:.0f} MB, last {peaks[-1]:.0f} MB, most {max(peaks):.0f} MB")


def timed(words: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(TRAIN), *words], env=os.environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return time.monotonic() - began


def moments(run: Path) -> list[float]:
    """When a run's work began and ended, in seconds."""
    return [(run / file).stat().st_mtime for file in ("config.yaml", "result.json")]


def work(run: Path) -> float:
    first, last = moments(run)
    return last - first


def between_trials(runs: list[Path]) -> list[float]:
    """What lies between one trial's work and the next one's."""
    each = [moments(run) for run in runs]
    return [after[0] - before[1] for before, after in itertools.pairwise(each)]


if __name__ == "__main__":
    main()
