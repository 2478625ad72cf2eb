"""README.md of a merged model: what it is made of, how exact it is, and what it scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmtune.config import compose
from vlmtune.config.adapter_source import read_json
from vlmtune.config.strict import strict
from vlmtune.export.merged import Merged
from vlmtune.export.scoring import CONFIDENCE
from vlmtune.export.sources import Source
from vlmtune.record import card, environment
from vlmtune.record.command import command_of, in_grammar
from vlmtune.record.licence import licence_line

Pairs = list[tuple[str, str]]


def write(merged: Merged, command: list[str]) -> Path:
    """Write the card into the merged folder. `command`: the words behind `merge`."""
    config = merged.asked
    versions = {"versions": environment.versions(), "git": environment.git_state(Path(__file__).parent)}
    scored = merged.scores
    return card.fill(
        merged.folder / "README.md",
        Path(__file__).with_name("card.md.j2"),
        name=f"{card.name_of(config)}, merged",
        front_matter=front_matter(merged),
        base=card.base_named(config),
        parts=[_part(source, share) for source, share in zip(merged.sources, merged.shares, strict=True)],
        several=len(merged.sources) > 1,
        way=_way(merged),
        dtype=str(merged.dtype).removeprefix("torch."),
        difference=merged.difference.sentence,
        scored=[model.cells() for model in scored],
        columns=[*scored[0].metrics] if scored else [],
        confidence=f"{CONFIDENCE:.0%}",
        data=_test_data(merged),
        command=" ".join(["python src/merge.py", *map(_shown, command)]),
        adapter=False,
        original=config.model.save_layout == "original" or merged.config.model.save_layout == "original",
        has_video=card.has_video(merged.folder),
        custom_code=config.model.trust_remote_code,
        system_prompt=config.model.system_prompt is not None,
        licence=licence_line(config.model),
        versions=card.versions_line(versions),
    )


def front_matter(merged: Merged) -> list[str]:
    """YAML lines that a hub reads."""
    on_hub = card.on_hub(merged.asked)
    base = [f"base_model: {json.dumps(merged.asked.model.path)}", "base_model_relation: finetune"] if on_hub else []
    tags = json.dumps(["vlmtune", "merge", *dict.fromkeys(source.kind for source in merged.sources)])
    return [*base, "library_name: transformers", "pipeline_tag: image-text-to-text", f"tags: {tags}"]


def _part(source: Source, share: float) -> dict[str, Any]:
    """What one run gave: its adapter, data, metrics and command."""
    config = strict(OmegaConf.create(source.config))
    files = [read_json(source.run / name) if (source.run / name).is_file() else {} for name in FILES]
    noted, result = files
    metrics: Mapping[str, Any] = result.get("metrics") or {}
    return {
        "name": card.shown(source.run.name),
        "share": f"{share:g}",
        "trained": card.trained(config),
        "data": card.data_pairs(config, {}, noted),
        "metrics": [(name, f"{value:.4f}") for name, value in metrics.items() if isinstance(value, int | float)],
        "command": command_of(config),
    }


FILES = ("environment.json", "result.json")


def _way(merged: Merged) -> Pairs:
    """How several adapters became one."""
    way = merged.way
    if way is None:
        return []
    found = [("method", f"PEFT's `{way.method}`")]
    if way.density is not None:
        found += [("density", f"{way.density:g}"), ("sign", way.majority_sign_method), ("seed", str(way.seed))]
    return found


def _test_data(merged: Merged) -> str:
    """The scored rows, so that they can be told again."""
    if not merged.scores:
        return ""
    files = [pair for name, pair in card.data_pairs(merged.asked, {"test": merged.rows}, {}) if name == "test"]
    return f"{files[0]}; fingerprint of the texts: `{merged.fingerprint}`"


def _shown(word: str) -> str:
    """A word of the command, without the folders of absolute paths."""
    [override] = compose.parse([word])
    return shlex.quote(f"{override.key_or_group}={in_grammar(override.value())}")
