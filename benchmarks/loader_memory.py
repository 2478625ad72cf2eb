"""The memory that training rows take while they wait for their step: shared memory of the loader's worker processes.

Rows are as Qwen2-VL's processor makes them of an image of 1,280 tokens: 5,120 patches of 1,176 numbers, 24 MB. The
processor itself is left out, so that the workers are always ahead. `--share 10` makes rows of a tenth of that.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch

from vlmtune.batching import loader as module
from vlmtune.batching.layout import Batch, Layout
from vlmtune.batching.loader import Loader
from vlmtune.batching.order import plan
from vlmtune.batching.preparation import COMPUTE, Preparation
from vlmtune.config.schema import TrainerConfig
from vlmtune.data.records import Record, Turn
from vlmtune.data.splits import RecordList

TOKENS, PATCHES, NUMBERS = 1280, 4, 1176
"""Of an image, a token, and a patch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=int, default=1, help="rows of 1/SHARE of the size")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16", help="compute type, which pixels get")
    options = parser.parse_args()
    patches = TOKENS * PATCHES // options.share
    module.lay_out = lambda encoder, rows, layout: batch_of(len(rows), patches)
    trainer = TrainerConfig(
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps,
        num_workers=options.workers,
    )
    records = RecordList([Record((Turn("what?", ("it",)),), (), None)] * 64)
    steps = plan(trainer, [None] * 64, [], processes=1, streamed=False, by_group=False)
    engine: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    encoder: Any = SimpleNamespace(image_cache=None)
    loader = Loader(encoder, records, steps, Layout(), trainer, engine)
    loader.preparation = Preparation(pixels=COMPUTE.get(options.precision))
    with Peak() as peak:
        for _ in loader.micro_batches():
            time.sleep(0.2)  # a forward and backward pass
    micro_batch = loader.make(0, 0).bytes
    print(f"a micro-batch {micro_batch / 1e6:.0f} MB, peak of shared memory {peak.found / 1e6:.0f} MB")


def batch_of(rows: int, patches: int) -> Batch:
    ids = torch.zeros(rows, 64, dtype=torch.long)
    return Batch(ids, ids, ids, {"pixel_values": torch.zeros(rows * patches, NUMBERS)}, rows=rows)


class Peak:
    """The most of the shared memory that is in use at once while inside."""

    def __enter__(self) -> Peak:
        self.before, self.found, self.ended = used(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.found = max(self.found, used() - self.before)


def used() -> int:
    """Bytes in use under /dev/shm, also by files that have no name any more."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


if __name__ == "__main__":
    main()
