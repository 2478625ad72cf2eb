"""Compare vlmtune with the plain Trainer and TRL on the same work, in alternating rounds: `make bench`.

Each contender is a process of its own. The figures are medians over the rounds, the ratio is to the fastest peer, and
the spread is the lowest and highest round. Losses of the first step are compared before speeds are. What the harness
costs: `--contenders bare everything`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import work

HERE = Path(__file__).parent
TRL = HERE.parent / ".venv-trl" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=160, help="160 rows are three epochs of 60 steps of 8")
    parser.add_argument("--contenders", nargs="+", default=["trainer", *(["trl"] if TRL.exists() else []), "vlmtune"])
    parser.add_argument("--folder", type=Path, default=HERE.parent / "outputs" / "bench")
    parser.add_argument("--tables", nargs="+", default=list(work.TABLES))
    parser.add_argument("--modes", nargs="+", default=["lora", "full"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    work.prepare(options.folder, options.rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(f"{options.steps} steps of 8 rows, the first 5 not counted, out of {options.rows} rows")
    print(f"{options.rounds} alternating rounds\n")
    print(
        "| table | mode | precision | contender | rows/s (low to high) | ratio | last third rows/s | first step s "
        "| peak MB | first loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for table in options.tables:
        for mode in options.modes:
            for precision in options.precisions:
                compare(options, options.contenders, table, mode, precision)


def version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def compare(options: argparse.Namespace, contenders: list[str], table: str, mode: str, precision: str) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name in contenders:
            found[name].append(once(options, name, table, mode, precision))
    losses = [runs[0]["first_loss"] for runs in found.values()]
    rate = {name: statistics.median(run["rows_per_second"] for run in runs) for name, runs in found.items()}
    fastest = max(value for name, value in rate.items() if name not in ("vlmtune", "everything"))
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        speeds = [run["rows_per_second"] for run in runs]
        print(
            f"| {table} | {mode} | {precision} | {name} | {rate[name]:.1f} ({min(speeds):.1f} to {max(speeds):.1f}) "
            f"| {rate[name] / fastest:.2f} | {middle['rows_per_second_at_last']:.1f} "
            f"| {middle['seconds_to_first_step']:.1f} "
            f"| {middle['peak_rss_megabytes']:.0f} | {middle['first_loss']:.3f} |",
            flush=True,
        )
    if max(losses) - min(losses) > 0.3 * max(losses):
        print(f"  first losses differ: {losses}; these contenders don't do the same work", flush=True)


def once(options: argparse.Namespace, name: str, table: str, mode: str, precision: str) -> dict[str, float]:
    python = str(TRL) if name == "trl" else sys.executable
    command = [python, str(HERE / "contender.py"), name, str(options.folder), "--table", table, "--mode", mode]
    command += ["--precision", precision, "--steps", str(options.steps)]
    environment = {**os.environ, "BENCH_STARTED": str(time.time()), "PYTHONPATH": str(HERE.parent / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
