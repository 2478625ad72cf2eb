"""Time the ways to answer easy-VQA by generation: `python benchmarks/evaluation.py RUN`.

Rows one by one and in batches with transformers' `generate`, in batches that share images, and as an evaluation does it
(loss and answers, with the references as drafts and features kept). Alternating rounds; medians; answers must be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import vlmtune
from vlmtune.batching.layout import Layout
from vlmtune.data import table
from vlmtune.evaluation.evaluate import evaluate
from vlmtune.evaluation.generate import generate
from vlmtune.models.features import FeatureStore
from vlmtune.models.parts import find_parts
from vlmtune.prompt.image_cache import STORES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run on easy-VQA")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    predictor = vlmtune.load(options.run)
    model, encoder, engine, config = predictor.model, predictor.encoder, predictor.engine, predictor.config
    data = dataclasses.replace(config.data, max_eval_rows=options.rows)
    rows = table.load(data, config.task, config.trainer.seed)["validation"].records
    size = config.trainer.eval_batch_size

    def generated(batch_size: int, share: bool) -> list[str]:
        pieces = {"batch_size": batch_size, "share": share, "autocast": engine.autocast}
        return generate(model, encoder, rows, config.generation, **pieces)  # type: ignore[arg-type]

    def evaluated() -> list[str]:
        STORES.clear()  # each round computes its features
        keeping = encoder.keeping(FeatureStore(model, find_parts(model), encoder.processor, data, engine))
        layout = Layout(share=True, share_answers=True)
        return evaluate(model, keeping, rows, config, engine, title="", layout=layout).predictions

    ways: dict[str, Callable[[], list[str]]] = {
        "generate, row by row": lambda: generated(1, False),
        f"generate, batches of {size}": lambda: generated(size, False),
        f"shared images, batches of {size}": lambda: generated(size, True),
        "evaluation, loss included": evaluated,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - began)
    reference = next(iter(answers.values()))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = next(iter(middle.values()))
    print("| way | rows/s | against row by row | answers that differ |\n|---|---|---|---|")
    for name, value in middle.items():
        other = sum(a != b for a, b in zip(answers[name], reference, strict=True))
        print(f"| {name} | {len(rows) / value:.0f} | {slowest / value:.1f} | {other} |")


if __name__ == "__main__":
    main()
