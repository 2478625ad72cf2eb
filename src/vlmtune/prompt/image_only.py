"""Processors without their video processor, which needs torchvision."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlmtune.errors import ModelError


@functools.cache
def torchvision_works() -> bool:
    """Whether torchvision can be imported. A build that doesn't match the installed torch raises, and counts as
    missing.
    """
    try:
        import torchvision  # noqa: F401
    except Exception:  # a mismatched build raises RuntimeError or OSError, not ImportError
        return False
    return True


def video_settings(path: Any, **options: Any) -> dict[str, Any] | None:
    """The video processor's settings in a checkpoint, from the files where transformers looks for them; None: there
    are none.

    `options`: arguments of `from_pretrained`, such as `revision`.
    """
    from transformers.video_processing_utils import VideoProcessorMixin

    try:
        settings, _ = VideoProcessorMixin.get_video_processor_dict(path, **options)
    except OSError:  # transformers raises this for a missing file
        return None
    return settings


def image_only(cls: Any, video: Mapping[str, Any] | None = None) -> Any:
    """A processor class without its video processor, which needs torchvision; images have a PIL implementation.

    `video`: the video processor's settings. They are saved with the processor in transformers' format, so that
    `AutoProcessor` can open the folder if torchvision is installed. None: the family's defaults.

    `get_attributes` controls loading, saving and type checks. `__init__` stays the original one, because transformers
    reads its signature to pass on `chat_template` and other arguments.
    """
    from transformers.processing_utils import ProcessorMixin

    attributes = cls.get_attributes()
    if "video_processor" not in attributes:
        return cls
    if attributes.index("video_processor") != 2:
        raise ModelError(
            f"{cls.__name__} needs torchvision: `pip install torchvision` in a build that matches your torch"
        )

    def arguments(sub: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [*super(image_class, sub)._get_arguments_from_pretrained(*args, **kwargs), None]

    def to_dict(self: Any) -> dict[str, Any]:
        return {**super(image_class, self).to_dict(), **_saved_video(self, video or {})}

    image_class: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "get_attributes": classmethod(lambda sub: [name for name in attributes if name != "video_processor"]),
            "_get_arguments_from_pretrained": classmethod(arguments),
            "to_dict": to_dict,
            "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM's uses it even for text
            "__reduce__": lambda self: (_blank, (cls, video), vars(self)),  # pickle looks a class up by its name
        },
    )
    return image_class


def _blank(cls: Any, video: Mapping[str, Any] | None) -> Any:
    """A processor of the class `image_only(cls, video)` without attributes, which unpickling then sets."""
    made = image_only(cls, video)
    return made.__new__(made)


def _saved_video(processor: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a full processor writes of its video processor; a value that `settings` lacks is its class's default.

    Empty where no class of transformers answers to the family's name: `AutoProcessor` then asks for the base's.
    """
    kept = {key: value for key, value in settings.items() if key not in ("image_processor_type", "processor_class")}
    if not (kept.get("video_processor_type") or "AutoVideoProcessor" in kept.get("auto_map", {})):
        name = _video_class(processor, str(settings.get("image_processor_type", "")))
        if name is None:
            return {}
        kept["video_processor_type"] = name
    return {"video_processor": kept}


def _video_class(processor: Any, image_class: str) -> str | None:
    """The name of a family's video class, as `AutoVideoProcessor` infers it.

    That is from the image class which the settings name, then from the family. Without torchvision its table of
    families is empty; the processor's name stands for it, and the image processor's where a family (Qwen2.5-VL) uses
    another's.
    """
    import transformers

    own = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    names = (
        image_class.replace("ImageProcessor", "VideoProcessor"),
        type(processor).__name__.replace("Processor", "VideoProcessor"),
        own.replace("ImageProcessor", "VideoProcessor"),
    )
    return next((name for name in names if name.endswith("VideoProcessor") and hasattr(transformers, name)), None)
