"""Code for model families that need more than what their processors provide.

`Family` is the generic code, which works for every family whose processor expands image placeholders. The others:
Idefics reads images through cross-attention and has no chat template; PaliGemma has none either, reads the prompt in
both directions, and separates it from the answer by token types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtune.errors import ModelError

TEXT_SIDE = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
"""A processor's outputs for text; all other outputs belong to images."""
Processed = tuple[dict[str, Any], list[str]]
"""The tensors of images, and the text for each image in a prompt."""
Process = Callable[[list[list[Any]]], Processed]
"""Makes them from opened images, nested by prompt, as `Family.images` does."""
Shown = Sequence[tuple[Sequence[Any], Sequence[Callable[[], Any]]]]
"""Images by prompt: their sources, and the functions that open them."""


class Family:
    """The generic code, for every family whose processor expands image placeholders."""

    chat_template: str | None = None
    """Used if the checkpoint has none."""
    needs_image = False
    """Whether rows without an image are refused."""
    shares_prefix = True
    """Whether several rows may share their image's tokens; if True, the start-up check decides."""
    ends: tuple[str, ...] = ()
    """Markers that end an answer although the tokenizer doesn't define them as special."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.image_token: str | None = getattr(processor, "image_token", None)
        """The placeholder in the chat template."""

    @property
    def feature_token(self) -> str:
        """The token that stands for one image feature in the language model's sequence."""
        tokenizer = self.processor.tokenizer
        return str(
            getattr(tokenizer, "image_token", None) or tokenizer.convert_ids_to_tokens(self.processor.image_token_id)
        )

    def images(self, pictures: list[list[Any]]) -> Processed:
        """The tensors of all images, which are nested by prompt, and the text for each image in a prompt.

        Calls the processor itself with prompts that only contain placeholders, since families differ in what they
        return, rename and drop.
        """
        prompts = [str(self.image_token) * len(group) for group in pictures]
        made = self.processor(
            text=prompts,
            images=pictures,
            images_kwargs={"return_tensors": "pt"},
            return_text_replacement_offsets=True,
        )
        expansions = [found["replacement"] for row in made.pop("text_replacement_offsets") for found in row]
        return {key: value for key, value in made.items() if key not in TEXT_SIDE}, expansions

    def token_types(self, ids: list[list[int]], labels: list[list[int]]) -> tuple[str, list[list[int]]] | None:
        """The name and values of the token types that the model needs, if any."""
        if not getattr(self.processor, "return_mm_token_type_ids", False):
            return None
        name = "token_type_ids" if "token_type_ids" in self.processor.model_input_names else "mm_token_type_ids"
        return name, self.processor.create_mm_token_type_ids(ids)

    def arrange(self, inputs: dict[str, Any], ids: Tensor, images_of: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`inputs` of the images, plus what else the model needs for the padded rows `ids` [B, T]."""
        return inputs


class Idefics(Family):
    """One image token per image; language layers attend to the most recent image through cross-attention.

    Its processor strips spaces at both ends of each item in a prompt; an end token belongs to the text before it.
    """

    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role != 'system' %}{{ '' if loop.first else '\n' }}"
        "{{ 'User:' if message.role == 'user' else 'Assistant: ' }}{% endif %}"
        "{% for part in message.content %}{% if part.type == 'image' %}"
        "{{ '' if loop.previtem is defined and loop.previtem.type == 'image' else '<fake_token_around_image>' }}"
        "<image><fake_token_around_image>"
        "{% else %}{{ part.text.strip(' ') if loop.nextitem is defined else part.text if message.role == 'assistant'"
        " else part.text.lstrip(' ') }}{% endif %}{% endfor %}<end_of_utterance>{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}Assistant:{% endif %}"
    )
    shares_prefix = False
    ends = ("<end_of_utterance>",)

    def __init__(self, processor: Any):
        super().__init__(processor)
        self.image_token = "<image>"

    def images(self, pictures: list[list[Any]]) -> Processed:
        flat = [picture for group in pictures for picture in group]
        return {"pixel_values": self.processor.image_processor(flat, return_tensors="pt")}, ["<image>"] * len(flat)

    def arrange(self, inputs: dict[str, Any], ids: Tensor, images_of: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`pixel_values` [B, I, 3, H, W], padded with zero images, and `image_attention_mask` [B, T, I]."""
        count = max(1, *(len(own) for own in images_of))
        size = self.processor.image_processor.image_size
        pixels = torch.zeros(len(ids), count, 3, size, size)
        for row, own in enumerate(images_of):
            for place, image in enumerate(own):
                pixels[row, place] = inputs["pixel_values"][image]
        latest = (ids == self.processor.image_token_id).cumsum(1)  # 0: no image yet
        return {
            "pixel_values": pixels,
            "image_attention_mask": (latest[..., None] == torch.arange(1, count + 1)).long(),
        }


class PaliGemma(Family):
    """Images, a prompt and one answer. The prompt is read in both directions, so an image depends on its question."""

    chat_template = (
        "{% if messages | length > 2 or messages[0].role == 'system' %}"
        "{{ raise_exception('PaliGemma takes one question, one answer and no system prompt') }}{% endif %}"
        "{% for part in messages[0].content if part.type == 'image' %}<image>{% endfor %}{{ bos_token }}"
        "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}{{ '\n' }}"
        "{% if messages | length > 1 %}{{ messages[1].content[0].text }}{{ eos_token }}{% endif %}"
    )
    needs_image = True
    shares_prefix = False

    def images(self, pictures: list[list[Any]]) -> Processed:
        """One prompt per image: the processor only accepts prompts of equal length."""
        return super().images([[picture] for group in pictures for picture in group])

    def token_types(self, ids: list[list[int]], labels: list[list[int]]) -> tuple[str, list[list[int]]] | None:
        return "token_type_ids", [[int(label >= 0) for label in row] for row in labels]


FAMILIES = {"IdeficsProcessor": Idefics, "PaliGemmaProcessor": PaliGemma}


def family_of(processor: Any) -> Family:
    """The family of `processor`. Raises ModelError if it is not known how to expand its placeholders."""
    from transformers.processing_utils import ProcessorMixin

    cls = FAMILIES.get(type(processor).__name__)
    if cls is not None:
        return cls(processor)
    expands = type(processor).replace_image_token is not ProcessorMixin.replace_image_token
    if not expands or getattr(processor, "image_token", None) is None:
        raise ModelError(
            f"{type(processor).__name__}: has no image placeholder that transformers expands, so it needs its own "
            "family class (docs/add_a_model.md)"
        )
    return Family(processor)
