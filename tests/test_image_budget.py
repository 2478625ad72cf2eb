"""One budget for all families: the tokens that images really get stay within it, and the model takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from vlmtune.batching.layout import padded
from vlmtune.config.schema import ImageConfig, ModelConfig
from vlmtune.errors import ConfigError
from vlmtune.models.load import load
from vlmtune.objectives.next_token import summed_loss
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.image_budget import set_image_budget, tokens_of
from vlmtune.prompt.processors import load_processor

SIZES = [(28, 28), (56, 56), (64, 48), (112, 56), (56, 112), (100, 90), (300, 200), (200, 600), (640, 640)]
BUDGETS = {  # family: bounds that are narrower than its own, and those that nothing fits
    "qwen2_vl": ((2, 6), (99, None)),
    "qwen2_5_vl": ((2, 6), (99, None)),
    "qwen3_vl": ((2, 6), (99, None)),
    "internvl": ((8, 12), (None, 3)),
    "llava_next": ((None, 60), (None, 8)),
    "llava_onevision": ((None, 60), (None, 8)),
    "idefics3": ((None, 4), (None, 3)),
    "smolvlm": ((None, 4), (None, 3)),
}
FIXED = {"llava": 16, "paligemma2": 16, "gemma3": 4, "idefics": 1}


def counts(processor: Any) -> list[int]:
    return [tokens_of(processor, width, height) for width, height in SIZES]


@pytest.mark.parametrize("family", BUDGETS)
def test_no_image_has_more_or_fewer_tokens_than_allowed(checkpoint_of: Callable[[str], Path], family: str) -> None:
    path = str(checkpoint_of(family))
    least, most = BUDGETS[family][0]
    free = counts(load_processor(ModelConfig(path=path)))
    assert max(free) > most, "or the bound below would change nothing"
    bound = counts(load_processor(ModelConfig(path=path, image=ImageConfig(least, most))))
    assert max(bound) <= most
    if least:
        assert min(free) < least <= min(bound)


@pytest.mark.parametrize("family", BUDGETS)
def test_the_model_takes_what_the_budget_leaves(checkpoint_of: Callable[[str], Path], family: str) -> None:
    """LLaVA-NeXT's model cuts features by the same list of grids as its processor."""
    config = ModelConfig(path=str(checkpoint_of(family)), image=ImageConfig(*BUDGETS[family][0]))
    fp32 = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    model, processor = load(config, tiny.method({}), **fp32)
    rows = [tiny.record(images=[tiny.image(*size)]) for size in SIZES]
    assert torch.isfinite(summed_loss(model, padded(Encoder(processor), rows)))


@pytest.mark.parametrize("family", BUDGETS)
def test_an_impossible_budget_says_what_the_family_can(checkpoint_of: Callable[[str], Path], family: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.image.*tokens"):
        load_processor(ModelConfig(path=str(checkpoint_of(family)), image=ImageConfig(*BUDGETS[family][1])))


@pytest.mark.parametrize("family", ["llava_next", "smolvlm"])
def test_families_without_a_lower_bound_say_so(checkpoint_of: Callable[[str], Path], family: str) -> None:
    with pytest.raises(ConfigError, match="has no lower bound"):
        load_processor(ModelConfig(path=str(checkpoint_of(family)), image=ImageConfig(min_tokens=2)))


@pytest.mark.parametrize("family", FIXED)
def test_a_fixed_count_must_be_within_the_bounds(checkpoint_of: Callable[[str], Path], family: str) -> None:
    processor = load_processor(ModelConfig(path=str(checkpoint_of(family))))
    count = FIXED[family]
    assert set(counts(processor)) == {count}
    set_image_budget(processor, ImageConfig(count, count))
    for wrong in (ImageConfig(count + 1, None), ImageConfig(None, count - 1 or None)):
        if wrong != ImageConfig(None, None):
            with pytest.raises(ConfigError, match=f"gives every image {count} tokens"):
                set_image_budget(processor, wrong)
