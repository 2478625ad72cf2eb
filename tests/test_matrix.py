"""Each family with each way to store and to train its weights. The run itself writes the table in docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_families
from vlmtune.batching.inputs import model_inputs
from vlmtune.batching.layout import padded
from vlmtune.config import compose
from vlmtune.config.schema import GenerationConfig
from vlmtune.errors import ConfigError
from vlmtune.evaluation.generate import generate
from vlmtune.launch import session
from vlmtune.models import adapters
from vlmtune.models.load import load_trained
from vlmtune.proof import checks
from vlmtune.training import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks transformers 5 for the old name
    "ignore:.*inputs will be cast from.*:UserWarning",  # bitsandbytes computes int8 in float16
    "ignore:Merge lora module to .-bit linear:UserWarning",
)

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
ADAPTERS = {
    "full": tiny.NONE,
    "lora": tiny.LORA,
    "dora": {**tiny.LORA, "use_dora": True},
}
CELLS = [
    (storage, adapter)
    for storage in ("bf16", "nf4", "int8")
    for adapter in ADAPTERS
    if storage == "bf16" or adapter != "full"  # quantized weights don't train themselves: ConfigError, tested elsewhere
]
TABLE: dict[str, dict[tuple[str, str], str]] = {}


def answers(model: Any, encoder: Any, rows: list[Any]) -> torch.Tensor:
    """Logits [N, V] in front of the answers' tokens."""
    batch = padded(encoder, rows)
    with torch.no_grad():
        logits = model.eval()(**model_inputs(model, batch)).logits
    return logits[:, :-1][batch.labels[:, 1:] != -100].float()


@pytest.mark.parametrize(("storage", "adapter"), CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_answers_and_merges(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, family: str, storage: str, adapter: str
) -> None:
    quantization = tiny.QUANTIZED.get(storage)
    precision = "bf16" if storage == "bf16" else "fp32"
    rate = 1e-3 if adapter == "full" else 1e-2
    config = tiny.config(
        checkpoint_of(family),
        adapter=ADAPTERS[adapter],
        quantization=quantization,
        precision=precision,
        learning_rate=rate,
        scheduler=tiny.CONSTANT,
    )
    rows = tiny.records(4)
    cell = TABLE.setdefault(family, {})
    if (storage, adapter) == ("int8", "dora"):
        with pytest.raises(ConfigError, match="use_dora: PEFT and bitsandbytes lose the scales"):
            tiny.assemble(config, rows)
        cell[storage, adapter] = "refused at the start on a CPU"
        return
    run = tiny.assemble(config, rows)
    checks.check_labels(run.encoder, rows)
    run.fit()
    assert run.losses[-1] < run.losses[0]

    before = answers(run.model, run.encoder, rows)
    checkpoint.save_model(run.model, run.processor, tmp_path / "model")
    dtypes = session.dtypes(config, run.engine)
    model, _ = load_trained(tmp_path, config, device=run.engine.device, **dtypes)
    with run.engine.autocast():
        wanted, found = answers(run.model, run.encoder, rows), answers(model, run.encoder, rows)
    assert torch.equal(found, wanted)
    limits = GenerationConfig(max_new_tokens=4)
    ask = {"generation": limits, "batch_size": 4, "autocast": run.engine.autocast}
    assert generate(model, run.encoder, rows, **ask) == generate(run.model, run.encoder, rows, **ask)
    cell[storage, adapter] = "trains, reloads, answers"
    if adapter != "full" and storage == "bf16":
        merged = answers(model.merge_and_unload(), run.encoder, rows)
        assert (merged - before).norm() < 0.05 * before.norm(), "merged weights are rounded to bfloat16"
        cell[storage, adapter] += ", merges"


def test_the_table_is_written() -> None:
    """Into docs/models.md, from what ran; after a partial run there is nothing to write."""
    if any(len(TABLE.get(family, {})) < len(CELLS) for family in FAMILIES):
        pytest.skip("not all cells ran in this session")
    head = ["family", *(f"{storage} {adapter}" for storage, adapter in CELLS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([f"`{f}`", *(TABLE[f][cell] for cell in CELLS)]) + " |" for f in FAMILIES]
    page = Path(__file__).parents[1] / "docs" / "models.md"
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- the test run writes from here -->\n", "<!-- to here -->"
    new = text[: text.index(begin) + len(begin)] + "\n".join(lines) + "\n" + text[text.index(end) :]
    if new != text:
        page.write_text(new, encoding="utf-8")


FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "adapter").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name not in ("none", "lora", "dora")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_file_fits_every_family(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, family: str, file: str
) -> None:
    composed = compose.read("train", [f"adapter={file}", "model=auto", f"model.path={checkpoint_of(family)}"])[0]
    config = tiny.config(checkpoint_of(family), adapter=composed.adapter, learning_rate=1e-2, max_steps=6)
    rows = tiny.records(4)
    run = tiny.assemble(config, rows)
    before = answers(run.model, run.encoder, rows)
    run.fit(penalty=lambda: adapters.penalty(run.model))
    assert run.losses[-1] < run.losses[0]
    after = answers(run.model, run.encoder, rows)
    assert not torch.equal(after, before)
    checkpoint.save_model(run.model, run.processor, tmp_path / "model")
    model, _ = load_trained(tmp_path, config, device=run.engine.device, **session.dtypes(config, run.engine))
    torch.testing.assert_close(answers(model, run.encoder, rows), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
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
    checkpoint.save_model(run.model, run.processor, tmp_path / "model")
    model, _ = load_trained(tmp_path, config, device=run.engine.device, **session.dtypes(config, run.engine))
    assert torch.equal(answers(model, run.encoder, rows), answers(run.model, run.encoder, rows))
    trained = {run.parts.of(name) for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {"language", "projector"}
