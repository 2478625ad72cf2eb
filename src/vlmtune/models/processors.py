"""Load a checkpoint's processor: tokenizer, image processor and chat template."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vlmtune.config import ModelConfig
from vlmtune.errors import ModelError
from vlmtune.models.families import FAMILIES
from vlmtune.models.image_budget import set_image_budget


@functools.cache
def torchvision_works() -> bool:
    """True where torchvision can be imported; a build that doesn't fit the installed torch raises, and counts as no."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a mismatched build raises RuntimeError or OSError, not ImportError
        return False
    return True


def image_only(cls: Any) -> Any:
    """A processor class without its video half, which needs torchvision; images have a PIL implementation.

    `get_attributes` drives loading, saving and type checks. `__init__` stays the original one, because transformers
    reads its signature to pass `chat_template` and others on.
    """
    from transformers.processing_utils import ProcessorMixin

    attributes = cls.get_attributes()
    if "video_processor" not in attributes:
        return cls
    if attributes.index("video_processor") != 2:
        raise ModelError(f"{cls.__name__} needs torchvision: `pip install torchvision` in the build of your torch")

    def arguments(sub: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [*super(image_class, sub)._get_arguments_from_pretrained(*args, **kwargs), None]

    image_class: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "get_attributes": classmethod(lambda sub: [name for name in attributes if name != "video_processor"]),
            "_get_arguments_from_pretrained": classmethod(arguments),
            "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM's reads the video half even for text
        },
    )
    return image_class


def load_processor(config: ModelConfig) -> Any:
    """The processor of `config.path`, with the image budget applied.

    Raises ModelError where the checkpoint has none, ConfigError where its family can't follow the budget.
    """
    options = hub_options(config)
    if is_original_internvl2(config):
        from vlmtune.models import internvl2

        processor = internvl2.load_processor(str(config.path), **remote(config))
    else:
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        cls = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(config.path, **options)), None)
        if cls is not None and "video_processor" in cls.get_attributes() and not torchvision_works():
            processor = image_only(cls).from_pretrained(config.path, **options)
        else:
            processor = AutoProcessor.from_pretrained(config.path, **options)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{config.path}: has no image processor, so it is not a vision-language model")
    if not getattr(processor, "chat_template", None) and type(processor).__name__ in FAMILIES:
        processor.chat_template = FAMILIES[type(processor).__name__].chat_template
    set_image_budget(processor, config.image)
    return processor


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that a hub id takes and a local folder doesn't."""
    return {"trust_remote_code": config.trust_remote_code, **remote(config)}


def remote(config: ModelConfig) -> dict[str, Any]:
    """The revision, for a hub id."""
    return {} if Path(str(config.path)).is_dir() else {"revision": config.revision or "main"}


def is_original_internvl2(config: ModelConfig) -> bool:
    """True for a checkpoint in InternVL2's own layout, which is opened without running its code."""
    from transformers.configuration_utils import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(config.path, **remote(config))
    return bool(found.get("model_type") == "internvl_chat")
