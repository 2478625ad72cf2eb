"""One cell of the table in docs/models.md: a family with a way to store its weights and a way to train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny
import tiny_families
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config.schema import GenerationConfig
from vlmtune.errors import ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.models.load import load_trained
from vlmtune.training.model_folder import save_model

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
ADAPTERS: dict[str, dict[str, Any]] = {"full": tiny.NONE, "lora": tiny.LORA, "dora": {**tiny.LORA, "use_dora": True}}
CELLS = [
    (storage, adapter)
    for storage in ("bf16", "nf4", "int8")
    for adapter in ADAPTERS
    if storage == "bf16" or adapter != "full"  # quantized weights don't train themselves: ConfigError, tested elsewhere
]


def answers(model: Any, encoder: Any, rows: list[Any]) -> torch.Tensor:
    """Logits [N, V] in front of the answers' tokens."""
    batch = padded(encoder, rows)
    with torch.no_grad():
        logits = model.eval()(**model_inputs(model, batch)).logits
    return logits[:, :-1][batch.labels[:, 1:] != -100].float()


def outcome(checkpoint_folder: Path, folder: Path, storage: str, adapter: str) -> str:
    """Train the checkpoint in this cell's way, save it to `folder`, open it again, ask it: what the table says of it.

    Raises AssertionError where a step of that doesn't hold.
    """
    config = tiny.config(
        checkpoint_folder,
        adapter=ADAPTERS[adapter],
        quantization=tiny.QUANTIZED.get(storage),
        precision="bf16" if storage == "bf16" else "fp32",
        learning_rate=1e-3 if adapter == "full" else 1e-2,
        scheduler=tiny.CONSTANT,
    )
    rows = tiny.records(4)
    try:
        run = tiny.assemble(config, rows)
    except ConfigError as error:
        if "use_dora: PEFT and bitsandbytes lose the scales" not in str(error):
            raise
        return "refused at the start on a CPU"
    run.fit()
    assert run.losses[-1] < run.losses[0]
    before = answers(run.model, run.encoder, rows)
    save_model(run.model, run.processor, folder / "model")
    model, _ = load_trained(folder, config, device=run.engine.device, **session.dtypes(config, run.engine))
    assert_same_answers(run, model, rows)
    if adapter == "full" or storage != "bf16":
        return "trains, reloads, answers"
    merged = answers(model.merge_and_unload(), run.encoder, rows)
    assert (merged - before).norm() < 0.05 * before.norm(), "merged weights are rounded to bfloat16"
    return "trains, reloads, answers, merges"


def assert_same_answers(run: tiny.Run, model: Any, rows: list[Any]) -> None:
    """The model that was opened again computes what the trained one does, bit by bit."""
    with run.engine.autocast():
        wanted, found = answers(run.model, run.encoder, rows), answers(model, run.encoder, rows)
    assert torch.equal(found, wanted)
    limits = GenerationConfig(max_new_tokens=4)
    ask: dict[str, Any] = {"generation": limits, "batch_size": 4, "autocast": run.engine.autocast}
    assert generate(model, run.encoder, rows, **ask) == generate(run.model, run.encoder, rows, **ask)


def table(outcomes: dict[tuple[str, str, str], str]) -> str:
    """The table of the page, from the outcome of each family, storage and adapter."""
    head = ["family", *(f"{storage} {adapter}" for storage, adapter in CELLS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([f"`{f}`", *(outcomes[f, *cell] for cell in CELLS)]) + " |" for f in FAMILIES]
    return "\n".join(lines) + "\n"
