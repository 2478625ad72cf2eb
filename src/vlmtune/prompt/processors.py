"""Load a checkpoint's processor: tokenizer, image processor and chat template."""

from __future__ import annotations

from typing import Any

from vlmtune.config.schema import ModelConfig
from vlmtune.errors import ModelError
from vlmtune.prompt.families import FAMILIES
from vlmtune.prompt.hub import hub_options, is_original_internvl2, remote
from vlmtune.prompt.image_budget import set_image_budget
from vlmtune.prompt.image_only import image_only, torchvision_works, video_settings


def load_processor(config: ModelConfig) -> Any:
    """The processor of `config.path`, with the image budget applied.

    Raises ModelError if the checkpoint has none, ConfigError if its family can't follow the budget.
    """
    options = hub_options(config)
    if is_original_internvl2(config):
        from vlmtune.prompt import internvl2

        processor = internvl2.load_processor(str(config.path), **remote(config))
    else:
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        cls = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(config.path, **options)), None)
        has_video = cls is not None and "video_processor" in cls.get_attributes()
        video = video_settings(config.path, **options) if has_video else None
        if has_video and (video is None or not torchvision_works()):
            processor = image_only(cls, video).from_pretrained(config.path, **options)
        else:
            processor = AutoProcessor.from_pretrained(config.path, **options)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{config.path}: has no image processor, so it is not a vision-language model")
    if not getattr(processor, "chat_template", None) and type(processor).__name__ in FAMILIES:
        processor.chat_template = FAMILIES[type(processor).__name__].chat_template
    set_image_budget(processor, config.image)
    return processor
