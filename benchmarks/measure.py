"""Memory and speed of training steps on the model that ships, against what `measured.json` holds: `make measure`.

Memory is the highest sum of tensors during one optimizer step, from torch's own record of allocations: equal from run
to run, where the peak of a process is not. Speed is a ratio: our loop's seconds over those of a bare torch loop on the
same rows, in processor time on one thread, the two alternating, so that a busy machine slows both. Medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import work
from torch.profiler import ProfilerActivity, profile

from vlmtune import run
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config import compose
from vlmtune.data import table
from vlmtune.objectives.next_token import summed_loss
from vlmtune.record.progress import Progress
from vlmtune.training import Setup, loop

FILE = Path(__file__).with_name("measured.json")
CASES = {
    "lora, images shared": ["trainer.share_prefix=on"],
    "lora, padded": ["trainer.share_prefix=off"],
    "full, images shared": ["trainer.share_prefix=on", "adapter=none"],
}
ROWS, BATCHES, PER_IMAGE = 16, 4, 4


def built(words: list[str], folder: Path) -> Setup:
    """A run on pico and four questions of each of easy-VQA's first images, ready for its first step."""
    work.write_table(folder / "rows.csv", ROWS * BATCHES, PER_IMAGE)
    own = ["data=csv", f"data.train={folder / 'rows.csv'}", f"trainer.batch_size={ROWS}", "trainer.num_workers=0"]
    still = ["tracker=none", "data.cache_features=off", "trainer.max_steps=1000", "trainer.precision=fp32"]
    config = compose.read("train", [*own, *still, *words, f"hydra.run.dir={folder}"])[0]
    splits = table.load(config.data, config.task, config.trainer.seed)
    return run.build(config, {"train": splits["train"]}, folder)


def ours(setup: Setup) -> Callable[[int], None]:
    """Train a number of steps with the loop of a run, on the first batches again and again."""
    batches = [next(iter(setup.loader.micro_batches(step))) for step in range(BATCHES)]

    def steps(count: int) -> None:
        loop.fit(
            setup.prepared,
            [batches[step % len(batches)] for step in range(count)],
            setup.optimizer,
            setup.scheduler,
            setup.engine,
            summed_loss,
            Progress(),
            expected_tokens=setup.loader.expected_tokens,
            max_grad_norm=1.0,
            hooks=loop.Hooks(),
        )

    return steps


def bare(setup: Setup) -> Callable[[int], None]:
    """The same rows in padded batches through transformers' own loss: what a plain torch loop does."""
    records = setup.splits["train"].records
    batches = [padded(setup.encoder, [records[n] for n in range(s * ROWS, (s + 1) * ROWS)]) for s in range(BATCHES)]
    inputs = [{**model_inputs(setup.model, batch), "labels": batch.labels} for batch in batches]
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def steps(count: int) -> None:
        setup.model.train()
        for step in range(count):
            setup.model(**inputs[step % len(inputs)]).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def peak_bytes(steps: Callable[[int], None], folder: Path) -> int:
    """The highest sum of tensors during a step, above what stands before it."""
    steps(1)  # the optimizer's state is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        steps(1)
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    level, highest = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        level += event["args"]["Bytes"]
        highest = max(highest, level)
    return highest


def ratio(one: Callable[[int], None], other: Callable[[int], None], rounds: int) -> float:
    """Median seconds of processor time of `one` over those of `other`, alternating."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for number, steps in enumerate((one, other)):
            began = time.process_time()
            steps(2)
            seconds[number].append(time.process_time() - began)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def measure(rounds: int = 7) -> dict[str, dict[str, float]]:
    """Bytes and ratio of each case."""
    torch.set_num_threads(1)
    found = {}
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            setup = built(words, Path(folder))
            steps, plain = ours(setup), bare(setup)
            memory = peak_bytes(steps, Path(folder))
            found[name] = {"peak_bytes": memory, "seconds_over_bare": round(ratio(steps, plain, rounds), 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {FILE.name}")
    options = parser.parse_args()
    found = measure()
    machine = f"{platform.machine()}, {platform.system()}, one thread, torch {torch.__version__}"
    text = json.dumps({"machine": machine, "command": "make measure", "cases": found}, indent=2) + "\n"
    if options.write:
        FILE.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
