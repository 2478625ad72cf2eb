"""Names of sweeps and trials."""

from __future__ import annotations

import pytest

from vlmtune.config.trial_names import LONGEST, sweep_name, trial_name


@pytest.mark.parametrize(
    ("file", "keys", "name"),
    [
        ("lora_rank", ["adapter.r"], "lora_rank"),
        (None, ["adapter.r", "trainer.learning_rate"], "adapter.r,trainer.learning_rate"),
        (None, [], "trials"),
    ],
)
def test_a_sweep_is_named_after_its_file_or_its_keys(file: str | None, keys: list[str], name: str) -> None:
    assert sweep_name(file, keys) == name


def test_many_keys_still_make_a_folders_name() -> None:
    keys = [f"adapter.target_modules_{number}" for number in range(40)]
    assert 0 < len(sweep_name(None, keys)) <= LONGEST
    assert sweep_name(None, keys).startswith("adapter.target_modules_0,adapter.target_modules_1,")


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        (["adapter.r=8", "trainer.learning_rate=0.0002"], "r=8 lr=2e-4"),
        (["++trainer.learning_rate=1e-05"], "lr=1e-5"),
        (["trainer.learning_rate=3.28712e-05"], "lr=3.29e-5"),
        (["trainer.learning_rate=0.00999"], "lr=0.00999"),
        (["adapter.lora_dropout=0.0", "adapter.lora_alpha=32"], "lora_dropout=0 lora_alpha=32"),
        (["adapter.lora_dropout=0.05"], "lora_dropout=0.05"),
        (["model=qwen2vl_7b", "adapter=lora"], "model=qwen2vl_7b adapter=lora"),
        (["data.train='a b.csv'"], "train=a b.csv"),
        (["adapter.parts=[vision]", "quantization.parts=[]"], "adapter.parts=[vision] quantization.parts=[]"),
        (["trainer.learning_rate=1", "optimizer.learning_rate=2"], "trainer.lr=1 optimizer.lr=2"),
        (["adapter=lora", "data.adapter=x"], "adapter=lora data.adapter=x"),
        (["model.revision=123e4"], "revision=1.23e6"),
        (["model.revision=12345678"], "revision=12345678"),
        ([], ""),
    ],
)
def test_a_trial_is_named_after_what_differs(swept: list[str], name: str) -> None:
    assert trial_name(swept) == name
