"""Each family with each way to store and to train its weights: what the table in docs/models.md says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from cells import CELLS, FAMILIES, answers, outcome, table
from grids import sampled
from vlmtune.config import compose
from vlmtune.config.schema import plain
from vlmtune.launch import session
from vlmtune.models import adapters
from vlmtune.models.load import load_trained
from vlmtune.training.model_folder import save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks transformers 5 for the old name
    "ignore:.*inputs will be cast from.*:UserWarning",  # bitsandbytes computes int8 in float16
    "ignore:Merge lora module to .-bit linear:UserWarning",
)

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
QUICK = {
    *(("qwen2_vl", storage, adapter) for storage, adapter in CELLS),
    *((family, *CELLS[number % len(CELLS)]) for number, family in enumerate(FAMILIES) if number % 4 == 1),
}
"""Each way with one family, and every fourth family in one way; `make test-slow` runs all."""


def written() -> dict[tuple[str, str, str], str]:
    """The table of docs/models.md."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| `")]
    return {
        (row[0].strip("`"), *cell): text
        for row in rows
        if len(row) == 1 + len(CELLS)
        for cell, text in zip(CELLS, row[1:], strict=True)
    }


def test_the_table_has_each_family_in_each_way() -> None:
    assert table(written()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "storage", "adapter"), sampled([(family, *cell) for family in FAMILIES for cell in CELLS], QUICK)
)
def test_trains_saves_answers_and_merges_as_the_table_says(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, family: str, storage: str, adapter: str
) -> None:
    assert outcome(checkpoint_of(family), tmp_path, storage, adapter) == written()[family, storage, adapter]


FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "adapter").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name not in ("none", "lora", "dora")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_file_fits_every_family(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, family: str, file: str
) -> None:
    composed = compose.read("train", [f"adapter={file}", "model=auto", f"model.path={checkpoint_of(family)}"])[0]
    config = tiny.config(checkpoint_of(family), adapter=plain(composed.adapter), learning_rate=1e-2, max_steps=6)
    rows = tiny.records(4)
    run = tiny.assemble(config, rows)
    before = answers(run.model, run.encoder, rows)
    run.fit(penalty=lambda: adapters.penalty(run.model))
    assert run.losses[-1] < run.losses[0]
    after = answers(run.model, run.encoder, rows)
    assert not torch.equal(after, before)
    save_model(run.model, run.processor, tmp_path / "model")
    model, _ = load_trained(tmp_path, config, device=run.engine.device, **session.dtypes(config, run.engine))
    torch.testing.assert_close(answers(model, run.encoder, rows), after, rtol=1e-4, atol=1e-4)


CHECKPOINTED = ("qwen2_vl", "idefics", "qwen3_5", "paligemma2")
"""Each has layers of its own kind: plain, with cross-attention, with linear attention, with a mask of its own."""


@pytest.mark.parametrize("family", sampled(FAMILIES, CHECKPOINTED))
def test_gradient_checkpointing_changes_nothing_but_memory(checkpoint_of: Callable[[str], Path], family: str) -> None:
    losses = []
    for on in (False, True):
        config = tiny.config(checkpoint_of(family), adapter=tiny.LORA, gradient_checkpointing=on, learning_rate=1e-2)
        losses.append(tiny.assemble(config, tiny.records(4)).fit().losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("family", "module"), [("llava", "multi_modal_projector"), ("qwen2_vl", "merger")])
def test_modules_that_an_adapter_saves_whole(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, family: str, module: str
) -> None:
    adapter = {**tiny.LORA, "modules_to_save": [module]}
    config = tiny.config(checkpoint_of(family), adapter=adapter, learning_rate=1e-2)
    rows = tiny.records(4)
    run = tiny.assemble(config, rows).fit()
    save_model(run.model, run.processor, tmp_path / "model")
    model, _ = load_trained(tmp_path, config, device=run.engine.device, **session.dtypes(config, run.engine))
    assert torch.equal(answers(model, run.encoder, rows), answers(run.model, run.encoder, rows))
    trained = {run.parts.of(name) for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {"language", "projector"}
