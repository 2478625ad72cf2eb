"""Processors without their video processor, which needs torchvision."""

from __future__ import annotations

import functools
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


def image_only(cls: Any) -> Any:
    """A processor class without its video processor, which needs torchvision; images have a PIL implementation.

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

    image_class: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "get_attributes": classmethod(lambda sub: [name for name in attributes if name != "video_processor"]),
            "_get_arguments_from_pretrained": classmethod(arguments),
            "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM's uses it even for text
        },
    )
    return image_class
