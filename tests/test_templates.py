"""Constructs that published chat templates are made of: a prompt is what `apply_chat_template` gives for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import tiny
from grids import sampled
from test_prompts import messages_of, record_of, shapes, with_template
from vlmtune.errors import DataError
from vlmtune.prompt.encode import Encoder
from vlmtune.proof.checks import check_labels
from vlmtune.proof.row_checker import Limits
from vlmtune.proof.rows import check_rows

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PARTS = (
    "{% for part in m.content %}{% if part.type == 'image' %}"
    + IMAGE
    + "{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
OPEN, CLOSE = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def loop(body: str, before: str = "") -> str:
    return before + "{% for m in messages %}" + body + "{% endfor %}" + ASK


TEMPLATES = {
    "default system prompt": loop(
        OPEN + PARTS + CLOSE,
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
    ),
    "numbered images": "{% set image_count = namespace(value=0) %}"
    + loop(
        OPEN
        + PARTS.replace(
            IMAGE,
            "{% set image_count.value = image_count.value + 1 %}"
            "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}" + IMAGE,
        )
        + CLOSE
    ),
    "always numbered images": "{% set n = namespace(value=0) %}"
    + loop(OPEN + PARTS.replace(IMAGE, "{% set n.value = n.value + 1 %}Image-{{ n.value }}: " + IMAGE) + CLOSE),
    "content that may be a string": loop(
        OPEN + "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}" + CLOSE
    ),
    "generation blocks": loop(
        OPEN
        + "{% if m.role == 'assistant' %}{% generation %}"
        + PARTS
        + "<|im_end|>{% endgeneration %}\n"
        + "{% else %}"
        + PARTS
        + CLOSE
        + "{% endif %}"
    ),
    "images first": loop(
        OPEN
        + "{% for part in m.content | selectattr('type', 'equalto', 'image') %}"
        + IMAGE
        + "\n{% endfor %}"
        + "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
        + CLOSE
    ),
    "trimmed texts": loop(OPEN + PARTS.replace("{{ part.text }}", "{{ part.text | trim }}") + CLOSE),
    "trimmed questions alone": loop(
        OPEN + PARTS.replace("{{ part.text }}", "{{ part.text | trim if m.role == 'user' else part.text }}") + CLOSE
    ),
    "system prompt within the first question": loop(
        "{% if m.role != 'system' %}"
        + OPEN
        + "{% if first.value and messages[0].role == 'system' %}{{ messages[0].content[0].text }}\n\n{% endif %}"
        + "{% set first.value = false %}"
        + PARTS
        + CLOSE
        + "{% endif %}",
        "{% set first = namespace(value=true) %}",
    ),
    "system prompt within the last question": loop(
        "{% if m.role == 'system' %}{% set kept.value = m.content[0].text %}{% else %}"
        + OPEN
        + "{% if loop.last and m.role == 'user' and kept.value %}{{ kept.value }}\n\n{% endif %}"
        + PARTS
        + CLOSE
        + "{% endif %}",
        "{% set kept = namespace(value='') %}",
    ),
    "roles that must alternate": loop(
        "{% if m.role != 'system' %}{% if (m.role == 'user') != (n.value % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% set n.value = n.value + 1 %}{% endif %}"
        + OPEN
        + PARTS
        + CLOSE,
        "{% set n = namespace(value=0) %}",
    ),
    "neighbours": loop(
        "{% if loop.previtem is defined and loop.previtem.role == 'assistant' %}\n{% endif %}"
        + OPEN
        + PARTS
        + "{% if loop.nextitem is defined %}<|im_end|>\n{% else %}<|im_end|>{% endif %}"
    ),
    "tools": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + loop("{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}" + OPEN + PARTS + CLOSE),
    "a macro": "{% macro written(content) %}{% for part in content %}{% if 'image' in part or part.type == 'image' %}"
    + IMAGE
    + "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endmacro %}"
    + loop(OPEN + "{{ written(m.content) }}" + CLOSE),
    "today's date": loop(
        OPEN + PARTS + CLOSE, "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
    ),
    "a space in front of answers": loop(
        "{{ m.role | upper }}:{% if m.role == 'assistant' %} {% else %}\n{% endif %}" + PARTS + "<|im_end|>\n"
    ).replace("<|im_start|>assistant\n", "ASSISTANT:"),
    "no line between": loop(OPEN + PARTS + "<|im_end|>"),
    "controls that eat space": loop(OPEN + PARTS + CLOSE).replace("{%", "{%-").replace("{{", "{{-"),
    "reasoning of the last answer alone": loop(
        "{% set text = m.content[0].text %}{% if m.role == 'assistant' and '</think>' in text and not loop.last %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        + OPEN
        + "{% if m.role == 'assistant' %}{{ text }}{% else %}"
        + PARTS
        + "{% endif %}"
        + CLOSE
    ),
    "no reasoning asked for": loop(OPEN + PARTS + CLOSE).replace(
        ASK, ASK.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    ),
}


@pytest.mark.parametrize("supervise", sampled(["last", "all"], ["all"]))
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_templates(encoder_of: Callable[[str], Encoder], name: str, supervise: str) -> None:
    encoder = with_template(encoder_of("qwen2_vl"), TEMPLATES[name], supervise=supervise)
    other = []
    for shape, row in shapes().items():
        wanted = encoder.processor.apply_chat_template(messages_of(row)[:-1], add_generation_prompt=True)
        record = record_of(row)
        if encoder.render(record, answered=False)[0] != wanted:
            other.append(shape)
        try:
            check_labels(encoder, [record])
        except DataError as error:
            other.append(f"{shape}: {error}")
        whole, spans = encoder.render(record, answered=True)
        if not whole.startswith(wanted) or whole[slice(*spans[-1])].strip()[:-10].strip() != row[1][-1][1].strip():
            other.append(f"{shape}: {whole[slice(*spans[-1])]!r}")
    assert not other


def test_a_text_that_the_template_leaves_out_costs_its_rows(encoder_of: Callable[[str], Encoder]) -> None:
    """LLaVA's first template knows no system prompt: it is refused, not forgotten."""
    encoder = with_template(
        encoder_of("qwen2_vl"), loop("{% if m.role != 'system' %}" + OPEN + PARTS + CLOSE + "{% endif %}")
    )
    encoder.check(record_of((None, [("What?", "Red", ())], 1)))
    with pytest.raises(DataError, match="leaves out or repeats the system prompt"):
        encoder.check(record_of(("Be brief.", [("What?", "Red", ())], 1)))


def test_rows_share_what_stands_before_the_image_wherever_the_template_puts_it(
    encoder_of: Callable[[str], Encoder],
) -> None:
    """A system prompt behind the earlier turns is not in front of their image."""
    encoder = with_template(encoder_of("qwen2_vl"), TEMPLATES["system prompt within the last question"])
    earlier, last = ("What?", "Red", (0,)), ("And?", "Blue", ())
    rows = [dataclasses.replace(record_of((system, [earlier, last], 1)), group="a") for system in ("x", "y")]
    assert len({encoder.prompt.group(row) for row in rows}) == 1
    alone = [dataclasses.replace(record_of((system, [earlier], 1)), group="a") for system in ("x", "y")]
    assert len({encoder.prompt.group(row) for row in alone}) == 2


def test_a_date_in_prompts_is_told(encoder_of: Callable[[str], Encoder], caplog: pytest.LogCaptureFixture) -> None:
    encoder = with_template(encoder_of("qwen2_vl"), TEMPLATES["today's date"])
    with caplog.at_level("INFO", "vlmtune"):
        check_rows(encoder, {}, tiny.config(None), Limits(positions=None, embeddings=10**6))
    assert "writes today's date into prompts" in caplog.text
