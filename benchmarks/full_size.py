"""A whole run on a model of true size with random weights, on any machine: where its memory goes, phase by phase.

`python benchmarks/full_size.py 2b FOLDER` writes a Qwen2-VL of the 2B's shape in the hub's layout to FOLDER, unless it
is there, and trains it with LoRA on nf4 weights for two steps. More words are overrides of the run. `7b` needs 17 GB of
disk and some 23 GB of main memory.

Printed for each phase of the run's log: seconds, and the peak of its own memory (anonymous) and of mapped files, which
the system takes back when it needs them. The process is watched from outside, ten times a second.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_work import write_model, write_rows

HERE = Path(__file__).parent
RUN = ["model=auto", "adapter=lora", "quantization=nf4", "data=csv", "tracker=none", "generation.max_new_tokens=2"]
SMALL = ["trainer.max_steps=2", "trainer.batch_size=1", "trainer.gradient_accumulation_steps=1"]
PLAIN = ["trainer.gradient_checkpointing=true", "trainer.eval_baseline=false", "trainer.eval_every=null"]
ROWS = 4
WIDTH = 60
"""Letters of a line of the log that name a phase."""


@dataclass
class Phase:
    """The time between two lines of the log. Bytes are peaks."""

    name: str
    seconds: float = 0.0
    own: int = 0
    mapped: int = 0


def main() -> None:
    size, folder, *overrides = sys.argv[1:]
    model, rows = Path(folder) / size, Path(folder) / "rows.csv"
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(size, model)
    if not rows.exists():
        write_rows(rows, "4x4", questions=1, count=ROWS)
    run = Path(folder) / time.strftime("run_%H-%M-%S")
    places = [f"model.path={model}", f"data.train={rows}", f"data.validation={rows}", f"hydra.run.dir={run}"]
    command = [sys.executable, str(HERE.parent / "src" / "train.py"), *RUN, *SMALL, *PLAIN, *places, *overrides]
    print(" ".join(command), flush=True)
    with subprocess.Popen(command) as process:
        phases = watched(process, run / "train.log")
    show(phases)
    sys.exit(process.returncode)


def watched(process: subprocess.Popen[bytes], log: Path) -> list[Phase]:
    """The phases of a run until it ends."""
    phases, began = [Phase("imports and config")], time.monotonic()
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        said = [line for line in lines if " INFO " in line[:35]]
        name = said[-1].partition(" INFO ")[2][:WIDTH] if said else phases[-1].name
        if name != phases[-1].name:
            phases.append(Phase(name))
            began = time.monotonic()
        now = phases[-1]
        now.seconds = time.monotonic() - began
        now.own, now.mapped = max(now.own, held(process.pid, "RssAnon")), max(now.mapped, held(process.pid, "RssFile"))
        time.sleep(0.1)
    return phases


def held(pid: int, kind: str) -> int:
    """Bytes of a process in main memory; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), 0)


def show(phases: list[Phase]) -> None:
    print(f"{'from this line of the log on':{WIDTH}} {'seconds':>8} {'own GB':>8} {'mapped GB':>10}")
    for phase in phases:
        print(f"{phase.name:{WIDTH}} {phase.seconds:8.1f} {phase.own / 1e9:8.2f} {phase.mapped / 1e9:10.2f}")


if __name__ == "__main__":
    main()
