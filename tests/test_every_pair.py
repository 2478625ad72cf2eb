"""Each adapter file with each quantization file on the model that ships: it trains and saves, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmtune
from vlmtune.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf"
QUANTIZATIONS = sorted(path.stem for path in (CONF / "quantization").glob("*.yaml"))
ADAPTERS = sorted(path.stem for path in (CONF / "adapter").glob("*.yaml"))
FOUR_BITS = ("nf4", "fp4")
REFUSED = {
    **{("none", kind): "can't be trained" for kind in (*FOUR_BITS, "int8")},
    **{("pissa", kind): "decomposes the base weights" for kind in (*FOUR_BITS, "int8")},
    **{(name, kind): "does not support it on 4-bit weights" for name in ("loha", "lokr") for kind in FOUR_BITS},
    ("dora", "int8"): "lose the scales of int8 weights",
}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trains_or_says_why_not(adapter: str, quantization: str, tmp_path: Path) -> None:
    overrides = [
        f"adapter={adapter}",
        f"quantization={quantization}",
        "tracker=none",
        "trainer.max_steps=20",
        "trainer.batch_size=16",
        "trainer.eval_baseline=false",
        "data.max_train_rows=640",
        "data.max_eval_rows=16",
        "generation.max_new_tokens=4",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    if reason := REFUSED.get((adapter, quantization)):
        with pytest.raises(ConfigError, match=reason):
            vlmtune.train(overrides)
        return
    result = vlmtune.train(overrides)
    assert result["status"] == "completed"
    assert result["steps"] == 20
    assert (tmp_path / "run" / "model" / ("model.safetensors" if adapter == "none" else "adapter_config.json")).exists()
