"""Qwen2-VL's sizes on one GPU: vlmtune, the plain Trainer and TRL on the same rows, a process for each run.

    python benchmarks/gpu.py --minutes 9.5 --raw raw.jsonl | tee table.md

Rows of the table appear as they finish, the most important first. With `--minutes` a row that would not fit into the
time left is skipped; `--folder` keeps the models for the next call; `--list` shows the cases. The value of an option
such as `--batch` replaces that of all chosen cases: `--cases lora --batch 1 2 4` are three of them. `--sizes tiny` is
for trying the script on a CPU.

It takes what the machine offers. A row whose packages are missing is skipped with that reason. To take them along as
wheels to a machine without a network (60 MB together, of which bitsandbytes has 43):

    there="--only-binary=:all: --python-version 3.12 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64"
    pip download --no-deps -d wheels $there hydra-core==1.3.2 omegaconf==2.3.0 transformers==5.23.0 peft==0.21.2
    pip download --no-deps -d wheels $there accelerate==1.15.0 bitsandbytes==0.50.2 pydantic==2.12.5
    pip download --no-deps -d wheels $there pydantic-core==2.41.5 typing-inspection annotated-types
    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3
    pip download -d wheels $there pandas rich pillow jinja2    # only those that the machine lacks, as `--list` says
    # on that machine:
    python -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site

Memory is in GiB. `start` is the peak from the start of the process to the first step, `train` that of the steps:
allocated by torch, reserved by torch, and in use on the device by the driver's count (on a CPU: the process's resident
memory). `wait` is the share of the time in which the process waited for its loader.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_work import FORMULA, SHAPES, flops
from meter import MARK, PHASES

HERE = Path(__file__).parent
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12}
PEAKS |= {"L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts."""
CONTENDERS = ("trainer", "trl", "vlmtune")
NEEDS = {
    "trainer": ("peft", "PIL", "jinja2"),
    "trl": ("peft", "PIL", "jinja2", "trl", "datasets"),
    "vlmtune": ("peft", "PIL", "jinja2", "hydra", "omegaconf", "pydantic", "rich", "pandas"),
}
"""Modules that a contender imports besides torch, transformers and accelerate."""


@dataclass(frozen=True)
class Case:
    """One setting, and who trains in it."""

    name: str
    why: str
    size: str = "7b"
    weights: str = "lora"
    """`lora` over bf16 weights, `nf4`: LoRA over 4-bit weights, `all`: bf16 weights and an 8-bit optimizer."""
    image: str = "36x36"
    """Tokens across and down."""
    questions: int = 1
    """Rows per image."""
    batch: int = 4
    accumulation: int = 1
    rank: int = 16
    targets: str = "linear"
    """Linear layers of the language model that LoRA is on: all, or those of its attention."""
    checkpointing: bool = True
    workers: int = 4
    evaluated: int = 0
    """Rows that are evaluated after training."""
    steps: int = 12
    words: tuple[str, ...] = ()
    """More overrides of vlmtune; the others can't take part then."""

    @property
    def contenders(self) -> tuple[str, ...]:
        return ("vlmtune",) if self.words else CONTENDERS

    @property
    def setting(self) -> str:
        lora = "" if self.weights == "all" else f" r={self.rank} {self.targets}"
        across, down = map(int, self.image.split("x"))
        parts = [f"{self.size} {self.weights}{lora}", f"{across * down} tokens", f"{self.questions} per image"]
        parts += [f"{self.batch}x{self.accumulation} rows", *(["checkpointing"] if self.checkpointing else [])]
        return ", ".join([*parts, *([f"{self.evaluated} evaluated"] if self.evaluated else []), *self.words])


CASES = (
    Case("swift", "ms-swift's public setting: 20 GiB there", image="32x40", rank=8, batch=1, accumulation=16, steps=8),
    Case("nf4", "QLoRA, as experiment=one_gpu has it", weights="nf4"),
    Case("lora", "LoRA over bf16 weights"),
    Case("shared", "eight questions an image", questions=8, batch=8),
    Case("all", "all weights", weights="all", batch=1),
    Case("one_step", "LoRA in one step", words=("model.rewrites=on",)),
    Case("unshared", "prefixes computed for each row", questions=8, batch=8, words=("trainer.share_prefix=off",)),
    Case("kept", "activations kept, not recomputed", batch=2, checkpointing=False),
    Case("small", "images of 64 tokens", image="8x8", batch=16, checkpointing=False),
    Case("evaluated", "the memory of an evaluation", evaluated=16),
    Case("2b", "the small model", size="2b", batch=8),
    Case("2b_all", "all weights of the small model", size="2b", weights="all", batch=4),
    Case(
        "flex",
        "FlexAttention over shared prefixes; transformers 5.23 refuses it for Qwen2-VL",
        questions=8,
        batch=8,
        words=("model.attention=flex_attention",),
    ),
)
COLUMNS = (
    "case",
    "setting",
    "contender",
    "rows/s",
    "tokens/s",
    "MFU",
    "wait",
    "start allocated",
    "train allocated",
    "train reserved",
    "start driver",
    "train driver",
    "evaluation allocated",
    "first loss",
    "last loss",
)


class Budget:
    """The time left, and how long runs of each kind took."""

    def __init__(self, minutes: float | None):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.taken: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def lacks(self, kind: str) -> str | None:
        """Why no more of this kind should begin; None if it may."""
        needed = self.taken.get(kind, 0.0)
        return (
            f"{max(self.left, 0):.0f} s left, the longest such run took {needed:.0f} s" if self.left < needed else None
        )

    def run(self, kind: str, command: list[str], environment: dict[str, str]) -> tuple[int | None, str, str]:
        """The exit code (None: out of time), standard output and standard error of a process."""
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        code: int | None = None
        try:
            out, err = process.communicate(timeout=None if self.left == float("inf") else max(self.left, 1))
            code = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            out, err = process.communicate()
        finally:
            end(process)
            self.taken[kind] = max(self.taken.get(kind, 0.0), time.monotonic() - began)
        return code, out, err


def end(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and those that it started; they are a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    options = parsed()
    cases = list(chosen(options))
    if options.list:
        print("\n".join(f"{case.name:10} {case.setting}: {case.why}" for case in cases))
        return
    budget = Budget(options.minutes)
    machine = ask(budget)
    absent = {name: lack for name in options.contenders if (lack := missing(NEEDS[name], machine))}
    describe(machine, cases, absent)
    options.contenders = [name for name in options.contenders if name not in absent]
    given = options.folder
    if given:
        given.mkdir(parents=True, exist_ok=True)
    with nullcontext(given) if given else tempfile.TemporaryDirectory() as folder:
        for case in cases:
            for _ in range(options.rounds):
                measure(case, machine, Path(folder), budget, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=1, help="of each case, its contenders alternating")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--folder", type=Path, help="keep the models there for the next call")
    parser.add_argument("--raw", type=Path, help="append all figures there, a line of JSON for each run")
    parser.add_argument("--list", action="store_true", help="show the chosen cases and run none")
    own = parser.add_argument_group("what replaces the cases' own; several values: a row for each")
    own.add_argument("--sizes", dest="size", nargs="+", choices=list(SHAPES))
    own.add_argument("--weights", nargs="+", choices=["lora", "nf4", "all"])
    own.add_argument("--images", dest="image", nargs="+", help="tokens across and down, such as 36x36 (at most 1296)")
    own.add_argument("--targets", nargs="+", choices=["linear", "attention"])
    own.add_argument("--checkpointing", nargs="+", type=lambda word: {"on": True, "off": False}[word], help="on, off")
    for name in ("questions", "batch", "accumulation", "rank", "workers", "evaluated", "steps"):
        own.add_argument(f"--{name}", nargs="+", type=int)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The chosen cases with the given values in place of their own; combinations that are equal then come once."""
    fields = set(asdict(CASES[0])) & {key for key, value in vars(options).items() if value is not None}
    seen = set()
    for case in CASES:
        if options.cases and case.name not in options.cases:
            continue
        for values in itertools.product(*(getattr(options, key) for key in sorted(fields))):
            made = replace(case, **dict(zip(sorted(fields), values, strict=True)))
            if made.setting not in seen:
                seen.add(made.setting)
                yield made


def ask(budget: Budget) -> dict[str, Any]:
    """What this machine has; asked in another process, because one that has used a GPU keeps memory on it."""
    code, out, err = budget.run("machine", [sys.executable, str(HERE / "gpu_run.py"), "--machine"], environment())
    if code != 0:
        sys.exit(f"torch does not work here:\n{err[-2000:]}")
    return said(out)[-1]


def environment() -> dict[str, str]:
    own = {"CUDA_VISIBLE_DEVICES": "0"}  # or the Trainer would use all
    return {**own, **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def said(out: str) -> list[dict[str, Any]]:
    """The lines of a process that are meant for us."""
    return [json.loads(line)["bench"] for line in out.splitlines() if line.startswith(MARK)]


def missing(modules: Iterable[str], machine: dict[str, Any]) -> str:
    """Which of these modules the machine lacks, as a reason; empty if it has all."""
    lacking = [module for module in modules if module not in machine["versions"]]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def describe(machine: dict[str, Any], cases: list[Case], absent: dict[str, str]) -> None:
    memory = f" with {machine['memory'] / 2**30:.0f} GiB" if "memory" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']}{memory}, {versions}, {time.strftime('%Y-%m-%d')}\n")
    for case in cases:
        print(f"- {case.name}: {case.why}; {case.steps} steps, the first 3 not counted")
    for name, lack in absent.items():
        print(f"- no rows of {name}: {lack}")
    most = peak(machine["device"])
    print(f"\n{FORMULA}\nPeak of this device: {f'{most / 1e12:.0f} TFLOP/s' if most else 'not known, so no MFU'}.\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)


def peak(device: str) -> float:
    return next((value for name, value in PEAKS.items() if name in device), 0.0)


def measure(case: Case, machine: dict[str, Any], folder: Path, budget: Budget, options: argparse.Namespace) -> None:
    """Print a row for each contender."""
    for name in (name for name in case.contenders if name in options.contenders):
        found = once(case, name, machine, folder, budget)
        if options.raw:
            with options.raw.open("a", encoding="utf-8") as file:
                line = {**asdict(case), "contender": name, "machine": machine, **found}
                file.write(json.dumps(line) + "\n")
        print(f"| {case.name} | {case.setting} | {name} | {' | '.join(cells(found))} |", flush=True)


def once(case: Case, name: str, machine: dict[str, Any], folder: Path, budget: Budget) -> dict[str, Any]:
    """The figures of one run, or what kept it from ending as `skipped` or `failed`."""
    kind = f"{case.size} of {name}"
    if problem := hindrance(case, machine) or budget.lacks(kind) or prepare(case, folder, budget):
        return {"skipped": problem}
    command = [sys.executable, str(HERE / "gpu_run.py"), name, str(folder / case.size), json.dumps(asdict(case))]
    code, out, err = budget.run(kind, command, environment())
    lines = said(out)
    if code == 0:
        return {**lines[-1], **rates(case, lines[-1], folder, machine)}
    if lines and "failed" in lines[-1]:
        return {"failed": f"at {lines[-1]['failed']}: {lines[-1]['why']}", "stderr": err[-3000:]}
    phase = next((line["phase"] for line in reversed(lines) if "phase" in line), PHASES[0])
    ended = "out of time" if code is None else f"ended from outside with {code}"
    return {"failed": f"at {phase}: {ended}", "stderr": err[-3000:]}


def hindrance(case: Case, machine: dict[str, Any]) -> str:
    """Why this machine can't run the case; empty if it can."""
    if case.weights == "lora" or (case.weights == "all" and not machine["cuda"]):
        return ""
    return missing(["bitsandbytes"], machine) or ("" if machine["cuda"] else "nf4 is measured on a GPU only")


def prepare(case: Case, folder: Path, budget: Budget) -> str | None:
    """Write the model, once for each size, and the case's rows. Returns what went wrong."""
    own = folder / case.size
    if not (own / "model" / "config.json").exists():
        command = [sys.executable, str(HERE / "gpu_work.py"), case.size, str(own / "model")]
        code, _, err = budget.run("writing", command, environment())
        if code != 0:
            return f"the model could not be written: {(err.strip().splitlines() or ['out of time'])[-1]}"
    rows = case.steps * case.batch * case.accumulation
    rows += -rows % case.questions
    command = [sys.executable, str(HERE / "gpu_work.py"), "rows", str(own), case.image, str(case.questions), str(rows)]
    code, _, err = budget.run("writing", command, environment())
    return None if code == 0 else f"the rows could not be written: {(err.strip().splitlines() or ['out of time'])[-1]}"


def rates(case: Case, found: dict[str, Any], folder: Path, machine: dict[str, Any]) -> dict[str, float]:
    """Tokens per second, and MFU (0 where the device's peak is not known)."""
    across, down = map(int, case.image.split("x"))
    image, text = across * down, found["text_tokens"]
    cost = flops(SHAPES[case.size], image, text, all_weights=case.weights == "all")
    most, rows = peak(machine["device"]), found["rows_per_second"]
    return {"tokens_per_second": rows * (image + text), "mfu": rows * cost / most if most else 0.0}


def cells(found: dict[str, Any]) -> list[str]:
    """The cells after the contender's name."""
    for word, mark in (("failed", " "), ("skipped", ": ")):
        if problem := found.get(word):
            return [f"{word}{mark}{problem[:120]}".replace("|", "/"), *[""] * (len(COLUMNS) - 4)]
    shares = [f"{found['mfu']:.1%}" if found["mfu"] else "-", f"{found['data_wait_share']:.1%}"]
    memory = ("start_allocated", "allocated", "reserved", "start_driver", "driver", "evaluation_allocated")
    sizes = ["-" if found[key] is None else f"{found[key] / 2**30:.2f}" for key in memory]
    losses = [f"{found['losses'][n]:.4f}" for n in (0, -1)]
    return [f"{found['rows_per_second']:.2f}", f"{found['tokens_per_second']:.0f}", *shares, *sizes, *losses]


if __name__ == "__main__":
    main()
