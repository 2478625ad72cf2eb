"""The licence of a base model, as its own model card states it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vlmtune.config.schema import ModelConfig

MOST = 100_000
"""Characters of a model card that are read."""


def licence_of(model: ModelConfig) -> str | None:
    """Its name, with a link where there is one; None if the files at hand don't say. Nothing is downloaded."""
    if model.fresh is not None:
        return None
    card = _card(model)
    front = _front_matter(card) if card is not None else {}
    names = [front.get("license_name"), front.get("license")]
    name = next((" ".join(map(str, n)) if isinstance(n, list) else str(n) for n in names if n and n != "other"), None)
    link = front.get("license_link")
    whole = isinstance(link, str) and link.startswith("https://")
    return name if name is None or not whole else f"{name} ({link})"


def _card(model: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    folder = Path(str(model.path)).expanduser()
    if folder.is_dir() or folder.is_absolute():
        return folder / "README.md" if (folder / "README.md").is_file() else None
    found = try_to_load_from_cache(str(model.path), "README.md", revision=model.revision or "main")
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the top of a model card; empty where there is none that can be read."""
    with card.open(encoding="utf-8", errors="replace") as file:
        _, dashes, rest = file.read(MOST).partition("---\n")
    text, end, _ = rest.partition("\n---")
    try:
        values = yaml.safe_load(text) if dashes and end else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def licence_line(model: ModelConfig) -> str:
    """What a card says of the base model's licence."""
    found = licence_of(model)
    if found is not None:
        return f"The base model's licence is {found}, by its own model card."
    on_hub = model.fresh is None and not Path(str(model.path)).expanduser().is_absolute()
    where = f": https://huggingface.co/{model.path}" if on_hub and not Path(str(model.path)).is_dir() else ""
    return f"The base model's licence is not in the files at hand; see its own model card{where}."
