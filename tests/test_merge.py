"""merge.py: a whole model that transformers opens alone and that answers as base and adapter do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from adapter_runs import drawn_run
from cells import answers
from grids import sampled
from test_cli import refused, script
from vlmtune.cli import merge as command
from vlmtune.config import compose
from vlmtune.config.schema import MethodConfig, ModelConfig
from vlmtune.errors import CheckpointError, ConfigError
from vlmtune.export import merge as page
from vlmtune.launch.world import World
from vlmtune.models.load import load
from vlmtune.models.saved_adapter import load_adapter
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.processors import load_processor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

FIELDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "adalora": {"method": "adalora", "total_step": 10, "tinit": 1, "tfinal": 1},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr"},
    "oft": {"method": "oft"},
    "ia3": {"method": "ia3", "feedforward_modules": ["down_proj"]},
    "vera": {"method": "vera", "target_modules": ["q_proj"]},
    "saved modules": {"modules_to_save": ["merger"]},
    "biases": {"bias": "all"},
}


def merged(*words: str) -> page.Merged:
    """As the command does it, in this process."""
    overrides = [*words]
    command.check(overrides, False, World())
    options = command._options(compose.compose("merge", compose.normalise(overrides)[0]))
    config = command._config(options, overrides)
    return page.merge(options, config, scored=compose.names(overrides, "data.test"), command=words)


@pytest.fixture
def run_of(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> Callable[..., Path]:
    def make(name: str = "run", family: str = "qwen2_vl", *, seed: int = 0, **fields: Any) -> Path:
        return drawn_run(tmp_path / name, checkpoint_of(family), fields, seed=seed)

    return make


def logits(model: Any, processor: Any) -> torch.Tensor:
    return answers(model, Encoder(processor), tiny.records(4))


def base_of(run: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    config = compose.strict(compose.saved_config(run, []))
    types = {"dtype": dtype, "compute_dtype": dtype}
    return load(config.model, MethodConfig(), device=torch.device("cpu"), **types)


@pytest.mark.parametrize("case", sampled([*FIELDS], {"lora", "dora", "ia3", "saved modules"}))
def test_transformers_opens_the_folder_and_it_answers_as_base_and_adapter(
    case: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    run = run_of(**FIELDS[case])
    found = merged(f"run={run}", f"output={tmp_path}/merged")
    assert found.difference.merged < 1e-5 < 1e-3 < found.difference.learned
    assert "drawn rows" in found.difference.rows  # the run has no data
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    processor = load_processor(
        ModelConfig(path=str(tmp_path / "merged"))
    )  # AutoProcessor's video half needs torchvision
    assert plain.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    base, own = base_of(run)
    before = logits(load_adapter(base, run / "model"), own)
    torch.testing.assert_close(logits(plain.eval(), processor), before, rtol=1e-4, atol=1e-4)


def test_transformers_opens_the_processor_too(run_of: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    merged(f"run={run_of(family='llava')}", f"output={tmp_path}/merged")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "merged")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}
    assert processor.apply_chat_template([asked], add_generation_prompt=True).endswith("What color? ASSISTANT:")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "processor_config.json"} <= files


def test_sixteen_bit_weights_are_rounded_once(run_of: Callable[..., Path], tmp_path: Path) -> None:
    """The files hold W + BA, computed in float32 from the base's bf16 weights and then rounded, bit by bit."""
    run = run_of()
    found = merged(f"run={run}", f"output={tmp_path}/merged", "dtype=bf16")
    assert 1e-4 < found.difference.merged < found.difference.tolerance
    base, _ = base_of(run, torch.bfloat16)
    wanted = load_adapter(base.float(), run / "model").merge_and_unload()
    files = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    saved = {name: tensor for file in files for name, tensor in file.items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    q = "layers.1.self_attn.q_proj.weight"
    [ours] = [tensor for name, tensor in saved.items() if name.endswith(q) and "visual" not in name]
    [theirs] = [p for name, p in wanted.named_parameters() if name.endswith(q) and "visual" not in name]
    assert torch.equal(ours, theirs.bfloat16())


def test_a_run_over_four_bits_is_merged_into_the_whole_base_and_both_are_scored(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The rounding of the base to 4 bits, which the adapter was trained over, is gone: the loss is close, not equal."""
    run = drawn_run(tmp_path / "run", checkpoint_of("qwen2_vl"), {}, quantization=tiny.QUANTIZED["nf4"])
    table = tiny.write_csv(tmp_path, [("What color?", "Red"), ("How many?", "three")])
    found = merged(f"run={run}", f"output={tmp_path}/merged", f"data.test={table}", "dtype=bf16")
    before, after = found.scores
    assert (before.name, after.name) == ("as trained, over bitsandbytes_4bit", "merged")
    assert before.metrics["loss"] != after.metrics["loss"]
    assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=0.2)
    files = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    assert {tensor.dtype for file in files for tensor in file.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_rounding_that_is_as_large_as_what_was_learned_is_said(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = drawn_run(tmp_path / "run", checkpoint_of("qwen2_vl"), {}, scale=1e-4)
    merged(f"run={run}", f"output={tmp_path}/merged", "dtype=bf16")
    assert "keep more of what was learned with dtype=fp32" in " ".join(capsys.readouterr().err.split())


def test_a_merge_that_is_not_the_same_leaves_nothing(
    run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if an adapter were left out of the sum."""
    run = run_of()
    monkeypatch.setattr(page, "merge_into_base", lambda model, types: model.unload())
    with pytest.raises(CheckpointError, match="the merged model is not the same: logits differ by"):
        merged(f"run={run}", f"output={tmp_path}/merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_merged_is_refused(run_of: Callable[..., Path], tmp_path: Path) -> None:
    tied = run_of("tied", "qwen2_vl_tied", target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="shares its weights with another layer"):
        merged(f"run={tied}", f"output={tmp_path}/merged")
    other = run_of("other", seed=1)
    moved = tiny.build("qwen2_vl", tmp_path / "moved", seed=3)
    with pytest.raises(ConfigError, match=r"was trained over another base model.* set model.path and model.revision"):
        merged(f"run={other}", f"output={tmp_path}/merged", f"model.path={moved}")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").touch()
    with pytest.raises(ConfigError, match="is there already"):
        merged(f"run={other}", f"output={tmp_path}/there")


def test_a_weight_that_is_not_finite_is_not_written(run_of: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = run_of()
    file = run / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"can't be merged: NaNs detected"):
        merged(f"run={run}", f"output={tmp_path}/merged")
    assert not (tmp_path / "merged").exists()


def test_mistakes_are_answered_before_anything_is_opened(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of()
    refused(
        script("merge", f"run={run}", "method=tis", "density=2", folder=tmp_path),
        1,
        "config error: 2 problems",
        "  - method=tis: did you mean ties?",
        "  - density=2.0: must be above 0 and at most 1",
    )
    refused(
        script("merge", f"run={run}", "weights=[1]", "density=0.5", "public=true", folder=tmp_path),
        1,
        "config error: 4 problems",
        "  - output: missing; name the folder to write, for instance output=merged",
        "  - weights: has no effect on one run; give several: runs=[A,B]",
        "  - density: has no effect on one run; give several: runs=[A,B]",
        "  - public: has no effect without push_to_hub=OWNER/NAME",
    )
    whole = tmp_path / "whole"
    (whole / "model").mkdir(parents=True)
    (whole / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="has no adapter to merge: it trained whole weights"):
        merged(f"run={whole}", f"output={tmp_path}/merged")
