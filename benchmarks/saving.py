"""What a checkpoint costs training, and what it costs to go on from it: `python benchmarks/saving.py`.

Blocks of steps without a checkpoint, with one that is waited for, and with one in the background, in turns. Medians. A
block ends with its write, so that what writing slows down is counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import work
from measure import built, ours

from vlmtune.training import Setup, Stopping, checkpoint
from vlmtune.training.saving import Saving

DEEP = "deep"
CASES = {
    "pico, LoRA": ["adapter=lora"],
    "pico, all weights": ["adapter=none"],
    f"{DEEP}, all weights": ["adapter=none", "trainer.share_prefix=off"],
}


def measure(setup: Setup, count: int, rounds: int) -> str:
    """One line: seconds of a step, of a checkpoint that is waited for, and of one in the background."""
    steps = ours(setup)
    steps(2)
    with Saving(setup, Stopping(setup)) as saving:

        def save() -> None:
            saving.progress.step += 1
            saving.save()

        def save_and_wait() -> None:
            save()
            saving.wait()

        ways: dict[str, Callable[[], None]] = {"none": lambda: None, "waited for": save_and_wait, "background": save}
        blocks: dict[str, list[float]] = {name: [] for name in ways}
        calls: dict[str, list[float]] = {name: [] for name in ways}
        save_and_wait()
        for name in [*ways] * rounds:
            began = time.perf_counter()
            steps(1)
            called = time.perf_counter()
            ways[name]()
            calls[name].append(time.perf_counter() - called)
            steps(count - 1)
            saving.wait()
            blocks[name].append(time.perf_counter() - began)
    block, call = ({name: statistics.median(found) for name, found in each.items()} for each in (blocks, calls))
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    return (
        f"{trained / 1e6:.1f}M trained weights, a step {block['none'] / count:.3f} s; a step waits for a checkpoint "
        f"{call['waited for']:.3f} s, in the background {call['background']:.3f} s; {count} steps with one take "
        f"{block['waited for']:.2f} s, {block['background']:.2f} s, without {block['none']:.2f} s; it is checked and "
        f"loaded in {loading(setup, saving):.2f} s"
    )


def loading(setup: Setup, saving: Saving) -> float:
    """Seconds to check and load the newest checkpoint."""
    began = time.perf_counter()
    found = checkpoint.newest(setup.folder)
    checkpoint.load_checkpoint(found, setup.model, setup.optimizer, None, saving.identity)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=220, help=f"of each tower of the {DEEP} model; 220: 200M weights")
    parser.add_argument("--steps", type=int, default=6, help="in a block")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the other cores write
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            more = []
            if name.startswith(DEEP):
                work.write_model(Path(folder) / "model", layers=options.layers)
                more = ["model=auto", f"model.path={folder}/model", "model.freeze=[]"]
            setup = built([*more, *words], Path(folder))
            print(f"{name}: {measure(setup, options.steps, options.rounds)}", flush=True)


if __name__ == "__main__":
    main()
