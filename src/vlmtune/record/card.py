"""model/README.md: the card of a trained model, filled in from what the run knows.

It holds no absolute path: a card is made to be shared. It is written after the folder's checksums and is not among
them, so its owner may edit it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmtune.config.paths import files_of
from vlmtune.config.schema import Config
from vlmtune.record.command import command_of
from vlmtune.record.licence import licence_line
from vlmtune.record.runfolder import write_whole

Pairs = list[tuple[str, str]]
SPLITS = ("train", "validation", "test")


def write(
    run: Path,
    config: Config,
    result: Mapping[str, Any],
    rows: Mapping[str, int],
    intervals: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Path:
    """Write `run`/model/README.md.

    `result`: what result.json holds. `rows`: how many rows each split has, by its name. `intervals`: of the metrics
    after training. Versions and fingerprints come from the run's environment.json.
    """
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return fill(
        run / "model" / "README.md",
        Path(__file__).with_name("card.md.j2"),
        name=name_of(config),
        front_matter=_front_matter(config),
        base=base_named(config),
        trained=trained(config),
        data=data_pairs(config, rows, environment),
        training=training(config, result),
        metrics=_metrics(result.get("metrics") or {}, intervals),
        rows=rows,
        status=result["status"],
        adapter=config.uses_adapter,
        loads=_opened_by_transformers(config),
        original=config.model.save_layout == "original",
        has_video=has_video(run / "model"),
        revision=config.model.revision if on_hub(config) else None,
        custom_code=config.model.trust_remote_code,
        system_prompt=config.model.system_prompt is not None,
        versions=versions_line(environment),
        command=command_of(config),
        licence=licence_line(config.model),
    )


def fill(path: Path, template: Path, **values: Any) -> Path:
    """Write a card from a template, which may include others of its folder and of this one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = Environment(loader=loader, autoescape=False, keep_trailing_newline=True, **options)
    write_whole(path, page.get_template(template.name).render(values))
    return path


def shown(value: Any) -> str:
    """A config value as inline code. Of an absolute path its last name is left."""
    if isinstance(value, str):
        text = Path(value).name if Path(value).expanduser().is_absolute() else value
    else:
        text = json.dumps(_bare(value), ensure_ascii=False)
    return "`" + text.replace("`", "'").replace("\n", " ").replace("|", "/") + "`"


def _bare(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _bare(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def on_hub(config: Config) -> bool:
    path = Path(str(config.model.path)).expanduser()
    return config.model.fresh is None and not path.is_absolute() and not path.is_dir()


def name_of(config: Config) -> str:
    name = config.model.name if config.model.name != "auto" else Path(str(config.model.path)).name
    return f"{name}, fine-tuned for {config.task.name}"


def _front_matter(config: Config) -> list[str]:
    """YAML lines that a hub reads. There is no licence among them: that is for the model's owner to say."""
    tags = ["vlmtune", *([str(config.adapter.method)] if config.uses_adapter else [])]
    base = [f"base_model: {json.dumps(config.model.path)}"] if on_hub(config) else []
    library = "peft" if config.uses_adapter else "transformers"
    return [*base, f"library_name: {library}", "pipeline_tag: image-text-to-text", f"tags: {json.dumps(tags)}"]


def base_named(config: Config) -> str:
    model = config.model
    if model.fresh is not None:
        return f"an untrained model, written by {shown(model.fresh)}"
    if on_hub(config):
        return f"{shown(model.path)} at revision {shown(model.revision or 'main')}"
    return f"{shown(model.name)}, a local folder named {shown(Path(str(model.path)).name)}"


def trained(config: Config) -> Pairs:
    """What was trained, and how the frozen rest was stored."""
    if config.uses_adapter:
        what = [("adapter", shown(config.adapter.method)), ("parts", shown(config.adapter.parts))]
        what += [(name, shown(value)) for name, value in config.adapter.fields.items() if value is not None]
        what += [("started from the adapter of", shown(config.adapter.from_))] if config.adapter.from_ else []
    else:
        what = [("weights", "all" if not config.model.freeze else f"all but {shown(config.model.freeze)}")]
    if config.is_quantized:
        fields = {name: value for name, value in config.quantization.fields.items() if value is not None}
        stored = f"{shown(config.quantization.method)} in {shown(config.quantization.parts)}: {shown(fields)}"
        what.append(("base weights stored as", stored))
    return what


def data_pairs(config: Config, rows: Mapping[str, int], environment: Mapping[str, Any]) -> Pairs:
    """Names of files without their folders, rows, and fingerprints that tell the same data again."""
    found = []
    for split in SPLITS:
        files = [shown(_file(name)) for name in files_of(getattr(config.data, split))]
        if split in rows or files:
            count = f"{rows[split]:,} rows" if 0 < rows.get(split, 0) < sys.maxsize else "rows not counted"
            found.append((split, ", ".join([count, *files])))
    if not any(files_of(getattr(config.data, split)) for split in SPLITS):
        found.append(("source", shown(config.data._target_)))
    if config.data.validation_fraction and config.data.validation is None:
        found.append(("held out for validation", f"{config.data.validation_fraction:.0%} of the training images"))
    prints = {"fingerprint of the texts": "data_fingerprint", "fingerprint of the images": "image_fingerprint"}
    return found + [(name, shown(environment[key])) for name, key in prints.items() if environment.get(key)]


def _file(name: str) -> str:
    """A file's own name; the id of a hub stays whole."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.suffix else name


def training(config: Config, result: Mapping[str, Any]) -> Pairs:
    trainer, steps = config.trainer, result["steps"]
    found = [
        ("optimizer steps", f"{steps:,}"),
        ("rows seen", f"{result['examples']:,}" + (f" ({result['examples'] / steps:.4g} a step)" if steps else "")),
        ("learning rate", f"{trainer.learning_rate:g}, {trainer.scheduler.name}"),
        ("warmup", f"{trainer.scheduler.warmup_fraction:g} of the steps"),
        ("optimizer", f"{config.optimizer.name}, weight decay {config.optimizer.weight_decay:g}"),
        ("precision", trainer.precision),
        ("gradient norm clipped at", f"{trainer.max_grad_norm:g}" if trainer.max_grad_norm else "never"),
        ("seed", str(trainer.seed)),
    ]
    if trainer.learning_rate_of:
        found.append(("learning rate by part", shown(trainer.learning_rate_of)))
    if config.model.image.max_tokens:
        found.append(("most tokens an image", str(config.model.image.max_tokens)))
    if trainer.best_metric:
        found.append(("weights are those of", f"the checkpoint with the best {shown(trainer.best_metric)}"))
    return found


def _metrics(
    metrics: Mapping[str, float | None], intervals: Mapping[str, tuple[float, float]]
) -> list[tuple[str, str, str, str]]:
    """Name, value before training, value after, value on the test rows; `-` where it was not measured."""
    names = dict.fromkeys(key.split("/", 1)[1] for key in metrics if "/" in key)

    def cell(split: str, name: str) -> str:
        value = metrics.get(f"{split}/{name}")
        ends = intervals.get(name) if split == "eval" else None
        return "-" if value is None else f"{value:.4f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")

    return [(name, *(cell(split, name) for split in ("baseline", "eval", "test"))) for name in names]  # type: ignore[misc]


def _opened_by_transformers(config: Config) -> bool:
    """False where PEFT can't find the base: an original InternVL2 checkpoint is converted by vlmtune as it loads."""
    from vlmtune.prompt.hub import is_original_internvl2

    return not config.uses_adapter or config.model.fresh is not None or not is_original_internvl2(config.model)


def has_video(model: Path) -> bool:
    """Whether the processor has a video half, which AutoProcessor opens with torchvision alone."""
    file = model / "processor_config.json"
    return file.exists() and "video_processor" in json.loads(file.read_text(encoding="utf-8"))


def versions_line(environment: Mapping[str, Any]) -> str:
    try:
        own = importlib.metadata.version("vlmtune")
    except importlib.metadata.PackageNotFoundError:
        own = "from a checkout"
    commit = (environment.get("git") or {}).get("sha", "")
    ours = f"vlmtune {own}" + (f" (commit {commit[:10]})" if commit else "")
    wanted = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    found = environment.get("versions") or {}
    return ", ".join([ours, *(f"{name} {found[name]}" for name in wanted if name in found)])
