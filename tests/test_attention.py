"""`model.attention`: every name of transformers is taken, what can't run is refused with the way out, and what computes
something else is found before training.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import tiny
from grids import thinned
from vlmtune import durable
from vlmtune.config import compose
from vlmtune.config.schema import ModelConfig
from vlmtune.config.together import combinations
from vlmtune.errors import ConfigError, ModelError
from vlmtune.models.load import load, load_trained
from vlmtune.proof.attention import check_attention

HALVES: dict[str, Any] = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16, "device": torch.device("cpu")}
FLOATS: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.float32, "device": torch.device("cpu")}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---------------------------------------------------------------- names


def problems(attention: str, **trainer: Any) -> list[str]:
    return combinations(tiny.config("a/b", model={"attention": attention}, **trainer))


def test_each_name_of_transformers_is_taken() -> None:
    names = ["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
    assert [problems(name) for name in names] == [[]] * len(names)
    assert problems("flash_atention_2")[0].startswith("model.attention=flash_atention_2: did you mean flash_attention")
    assert problems("flash_attention_2", share_prefix="on") == [
        "trainer.share_prefix=on: flash_attention_2 only knows padding, and no mask of branches; use auto"
    ]


def test_a_kernel_of_the_hub_is_taken_at_a_pinned_commit_by_who_trusts_it() -> None:
    name = f"kernels-community/flash-attn2@{COMMIT}"
    trusted = ["model.trust_remote_code=true", f"model.revision={COMMIT}"]
    [config] = compose.read("train", [f"model.attention={name}", *trusted])[:1]
    assert config.model.attention == name
    [refused] = problems(name)
    assert refused.endswith("is compiled code from the hub; to run it, set model.trust_remote_code=true")
    for moving in ("kernels-community/flash-attn2", "kernels-community/flash-attn2@main", "a/b/c"):
        assert "only runs at a pinned commit" in problems(moving)[0]


# ---------------------------------------------------------------- what is missing


def refusal(path: Path, name: str, types: dict[str, Any], **keys: Any) -> str:
    with pytest.raises((ConfigError, ModelError)) as caught:
        load(ModelConfig(path=str(path), attention=name, **keys), tiny.method({}), **types)
    return str(caught.value)


def test_what_this_machine_lacks_is_named(checkpoint_of: Callable[[str], Path]) -> None:
    """On a machine with these packages the tests would compute with them; continuous integration has none."""
    path = checkpoint_of("llava")
    assert "pip install flash-attn" in refusal(path, "flash_attention_2", HALVES)
    assert "install it from https://github.com/Dao-AILab" in refusal(path, "flash_attention_3", HALVES)
    assert "set trainer.precision=bf16 or fp16" in refusal(path, "flash_attention_2", FLOATS)
    assert "pip install kernels" in refusal(path, f"a/b@{COMMIT}", HALVES, trust_remote_code=True)


def test_what_the_model_lacks_is_named(checkpoint_of: Callable[[str], Path]) -> None:
    found = refusal(checkpoint_of("qwen2_vl"), "flex_attention", FLOATS)
    assert found.startswith("model.attention=flex_attention: Qwen2VL")
    assert found.endswith("flex_attention; use auto")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_checkpoint_that_asks_for_compiled_code_is_refused(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, key: str
) -> None:
    folder = Path(shutil.copytree(checkpoint_of("llava"), tmp_path / "llava"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, key: "someone/kernel"}))
    assert "asks for the attention someone/kernel, which is compiled code" in refusal(folder, "auto", FLOATS)
    model, _ = load(ModelConfig(path=str(folder), attention="sdpa"), tiny.method({}), **FLOATS)
    assert {model.config._attn_implementation, model.config.text_config._attn_implementation} == {"sdpa"}


def test_a_run_is_opened_without_the_attention_that_it_was_trained_with(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with durable.whole(tmp_path / "model") as folder:
        shutil.copytree(checkpoint_of("llava"), folder, dirs_exist_ok=True)
    config = tiny.config(checkpoint_of("llava"), model={"attention": "flash_attention_2"})
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        model, _ = load_trained(tmp_path, config, **HALVES)
    assert "model.attention=flash_attention_2 is not used here: needs a package" in caplog.text
    assert "flash" not in model.config._attn_implementation


# ---------------------------------------------------------------- what computes something else


def own_mask(query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """[B, 1, T, K]: earlier keys that are no padding, and for each query itself."""
    queries, keys = query.shape[2], key.shape[2]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    shown = torch.ones(1, keys) if padding is None else padding
    itself = torch.eye(keys, dtype=torch.bool)[-queries:]
    return (shown.bool()[:, None, None, :] & causal) | itself


def padding_only(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """As flash attention: padding [B, K], and causal by itself."""
    assert attention_mask is None or attention_mask.dim() == 2, "would read outside of its tensors"
    mask = own_mask(query, key, attention_mask) if module.is_causal else None
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def no_padding(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    mask = own_mask(query, key, None) if module.is_causal else None
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def no_order(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": False})


def no_backward(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    if query.requires_grad:
        raise NotImplementedError("there is no backward pass")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def sound(*args: Any, **options: Any) -> Any:
    return sdpa_attention_forward(*args, **options)


@pytest.fixture
def registered() -> Iterator[None]:
    """The functions above under their names."""
    functions = {padding_only: flash_attention_mask}
    functions |= dict.fromkeys((no_padding, no_order, no_backward, sound), sdpa_mask)
    for function, mask in functions.items():
        AttentionInterface.register(function.__name__, function)
        AttentionMaskInterface.register(function.__name__, mask)
    yield
    for function in functions:
        del AttentionInterface._global_mapping[function.__name__]
        del AttentionMaskInterface._global_mapping[function.__name__]


def trained(path: Path, **keys: Any) -> tiny.Run:
    attention, share = keys["attention"], keys.get("share_prefix", "auto")
    config = tiny.config(path, adapter=tiny.LORA, model={"attention": attention}, share_prefix=share)
    return tiny.assemble(config, tiny.records(8, per_image=4)).fit()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family", thinned(["llava", "qwen2_vl"], 1))
def test_an_attention_that_only_knows_padding_trains_on_padded_batches(
    checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture, family: str
) -> None:
    path = checkpoint_of(family)
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        found = trained(path, attention="padding_only")
    assert "attention  padding_only gives the loss of sdpa, whichever side is padded" in caplog.text
    assert "padded, one row each (" in caplog.text
    assert "padding_only only knows padding" in caplog.text
    wanted = trained(path, attention="sdpa", share_prefix="off")
    assert found.losses == pytest.approx(wanted.losses, rel=1e-4)
    with pytest.raises(ConfigError, match=r"share_prefix=on: .*padding_only only knows padding"):
        trained(path, attention="padding_only", share_prefix="on")


@pytest.mark.usefixtures("registered")
def test_another_attention_that_takes_masks_shares_images(
    checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        found = trained(checkpoint_of("qwen2_vl"), attention="sound")
    assert "shared, each image once" in caplog.text
    assert found.model.config._attn_implementation == "sound"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_padding", "the loss of rows padded on the left is"),
        ("no_order", "the loss of rows padded on the right is"),
        ("no_backward", "fails with this model, on this machine: there is no backward pass"),
        ("paged|eager", "fails with this model, on this machine: `paged"),
    ],
)
def test_an_attention_that_computes_something_else_stops_the_run(
    checkpoint_of: Callable[[str], Path], name: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        trained(checkpoint_of("qwen2_vl"), attention=name)
    assert str(caught.value).startswith(f"model.attention={name}: {reason}")


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_transformers_own_attention_is_not_compared(
    checkpoint_of: Callable[[str], Path], encoder_of: Any, name: str
) -> None:
    model, _ = load(ModelConfig(path=str(checkpoint_of("llava")), attention=name), tiny.method({}), **FLOATS)
    assert check_attention(model, encoder_of("llava"), tiny.records(2), Accelerator(cpu=True)) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of torch
def test_flex_attention_trains_or_says_why_not(checkpoint_of: Callable[[str], Path]) -> None:
    """torch compiles it for a CPU, but has no backward pass there."""
    with pytest.raises(
        ConfigError, match=r"model\.attention=flex_attention: fails with this model, on this machine: .*backward"
    ):
        trained(checkpoint_of("llava"), attention="flex_attention")
