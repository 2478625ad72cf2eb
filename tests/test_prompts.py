"""A prompt is the text and the tokens of the checkpoint's own template, for every family and every shape of row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

import tiny
import tiny_families
from grids import sampled
from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError
from vlmtune.prompt.encode import Encoder
from vlmtune.prompt.families import Family
from vlmtune.prompt.labels import IGNORE
from vlmtune.proof.checks import check_inputs, check_labels

FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
TEXTS = [
    "What color is it?",
    " outer spaces ",
    "\nleading line",
    "trailing line\n",
    "\t tabs \t",
    "two\n\nlines",
    "",
    " ",
    "$1,234.00",
    "(A) or (B)?",
    "12 + 7",
    "{{ 1 }} {% x %}",
    'back\\slash and "quotes"',
    "e\u0301 赤い ؟ 😀",
    "USER: ASSISTANT: [INST] x [/INST]",
    "system\nuser\nassistant",
]
ANSWERS = ["Red", "\nYes, one.", "$1,234.00", "(A)", "42", " spaced ", "", "-5", "\n\n- a\n- b", "```json\n{}\n```"]
PICTURES = [tiny.image(seed=n) for n in range(3)]

Row = tuple[str | None, list[tuple[str, str, tuple[int, ...]]], int]
"""System prompt; turns as question, answer and the places of images in the question; how many images."""


def shapes() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, text in enumerate(TEXTS):
        rows[f"question {number}"] = (None, [(text, "Red", ())], 1)
        rows[f"without image {number}"] = (None, [(text or "x", "Red", ())], 0)
        rows[f"system {number}"] = (text or "x", [("What?", "Red", ())], 1)
        rows[f"earlier {number}"] = (None, [("What?", text, ()), (text, "Red", ())], 1)
    for number, answer in enumerate(ANSWERS):
        rows[f"answer {number}"] = (None, [("What?", answer, ())], 1)
        rows[f"two answers {number}"] = (None, [("What?", answer, ()), ("And?", answer, ())], 1)
    return rows | {
        "image behind the text": (None, [("What is it?\n", "Red", (12,))], 1),
        "image in the middle": (None, [("is this  red?", "Red", (8,))], 1),
        "images around": (None, [("first , second ?", "Red", (0, 8, 16))], 3),
        "several in front": (None, [("Which?", "Red", ())], 3),
        "images in later turns": (None, [("a?", "b", ()), ("this? ", "c", (6,)), ("or  this?", "d", (3,))], 2),
        "system and later images": ("Be brief.", [("a? ", "b", (0,)), (" c?", "d", (1,))], 2),
        "five turns": (None, [(f"q{n}?", f"a{n}", ()) for n in range(5)], 1),
    }


def record_of(row: Row) -> Record:
    system, turns, images = row
    made = tuple(Turn(question, (answer,), places) for question, answer, places in turns)
    return Record(made, tuple(PICTURES[:images]), system=system)


def messages_of(row: Row) -> list[dict[str, Any]]:
    """As a person would write the row for `apply_chat_template`: images in front, or cut into the question."""
    system, turns, images = row
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    placed = sum(len(places) for *_, places in turns)
    for number, (question, answer, places) in enumerate(turns):
        parts: list[dict[str, Any]] = [{"type": "image"}] * (images - placed if number == 0 else 0)
        begin = 0
        for place in places:
            parts += [{"type": "text", "text": question[begin:place]}] * (place > begin) + [{"type": "image"}]
            begin = place
        if question[begin:] or not places:
            parts.append({"type": "text", "text": question[begin:]})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.fixture(params=FAMILIES)
def encoder(request: pytest.FixtureRequest, encoder_of: Callable[[str], Encoder]) -> Encoder:
    return encoder_of(request.param)


def test_there_are_enough_of_them() -> None:
    assert len(shapes()) >= 80


def test_prompts_are_the_templates(encoder: Encoder) -> None:
    """Text for text, and token for token where the processor makes tokens of a text by itself."""
    processor, other = encoder.processor, []
    for name, row in shapes().items():
        record, messages = record_of(row), messages_of(row)
        if encoder.family.needs_image and (len(record.turns) > 1 or record.system is not None):
            with pytest.raises(DataError, match="refuses the conversation: PaliGemma takes one question"):
                encoder.render(record, answered=False)
            continue
        if encoder.family.needs_image and not record.images:
            continue
        wanted = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        if encoder.render(record, answered=False)[0] != wanted:
            other.append(name)
        if type(encoder.family) is Family:
            images = [list(record.images)] if record.images else None
            bos = encoder.tokenizer.bos_token
            options = {"add_special_tokens": not (bos and bos in wanted), "return_tensors": "pt"}
            theirs = processor(text=[wanted], images=images, **options)["input_ids"][0].tolist()
            if encoder.encode([record], answered=False).input_ids[0] != theirs:
                other.append(f"{name}: tokens")
    assert not other


def test_idefics_strips_as_its_processor_does(encoder_of: Callable[[str], Encoder]) -> None:
    encoder, end = encoder_of("idefics"), "<end_of_utterance>"
    for text in TEXTS:
        items = ["User:", PICTURES[0], f"{text}{end}", "\nAssistant:"]
        theirs = encoder.processor(text=[items], return_tensors="pt", add_end_of_utterance_token=False)
        ours = encoder.encode([tiny.record(text, images=[PICTURES[0]])], answered=False).input_ids[0]
        assert ours == theirs["input_ids"][0].tolist(), text
    items = ["User:", "left ", PICTURES[0], " or right ", PICTURES[1], f" ?{end}", "\nAssistant:"]
    theirs = encoder.processor(text=[items], return_tensors="pt", add_end_of_utterance_token=False)
    row = Record((Turn("left  or right  ?", (), (5, 15)),), (PICTURES[0], PICTURES[1]))
    assert encoder.encode([row], answered=False).input_ids[0] == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("supervise", sampled(["last", "all"], ["last"]))
def test_every_shape_passes_the_proof_before_training(encoder: Encoder, supervise: str) -> None:
    """Whichever row is looked at: none is refused with "please report this model"."""
    own = Encoder(encoder.processor, supervise=supervise)
    rows = {name: record_of(row) for name, row in shapes().items()}
    if own.family.needs_image:
        rows = {name: r for name, r in rows.items() if r.images and len(r.turns) == 1 and r.system is None}
    check_labels(own, list(rows.values()))
    for name, row in rows.items():
        if "answer" in name and supervise == "last":
            check_inputs(own, [row])
    check_inputs(own, list(rows.values()))


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm", "idefics3", "llava", "llava_next", "gemma3", "internvl"])
def test_all_answers_are_found_where_images_differ_between_questions(
    encoder_of: Callable[[str], Encoder], family: str
) -> None:
    """SmolVLM's template writes a space after `User:` where no image follows, which is no part of a separator."""
    encoder = Encoder(encoder_of(family).processor, supervise="all")
    turns = (Turn("a?", ("one",), (0,)), Turn("b?", (" two",)), Turn("c?", ("",), (2,)), Turn("d?", ("four",)))
    row = Record(turns, (PICTURES[0], PICTURES[1]))
    labels = encoder.encode([row], answered=True).labels[0]
    assert sum(i in encoder.answers.end_ids for i in labels) == 4, "each answer learns to stop"
    found = encoder.supervised_texts(row)
    assert ["".join(text.split()).removesuffix("</s>").split("<")[0] for text in found] == ["one", "two", "", "four"]
    alone = encoder.supervised_texts(Record(turns[:1], (PICTURES[0],)))[0]
    assert found[0] == alone, "an earlier answer is trained with the separator of a last one"
    check_labels(encoder, [row])


# ---------------------------------------------------------------- templates that reason

THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content[0].text %}{% set reason = '' %}"
    "{% if '</think>' in text %}{% set reason = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ reason }}\n</think>\n\n{% endif %}{{ text }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
STRIPPING = THINKING.replace("{% if loop.last %}<think>\n{{ reason }}\n</think>\n\n{% endif %}", "")


def with_template(encoder: Encoder, template: str, **options: Any) -> Encoder:
    processor = type("Copy", (type(encoder.processor),), {}).__new__(type(encoder.processor))
    processor.__dict__.update(encoder.processor.__dict__)
    processor.chat_template = template
    return Encoder(processor, **options)


@pytest.mark.parametrize("template", [THINKING, STRIPPING])
def test_the_opening_of_an_answer_is_not_written_twice(encoder_of: Callable[[str], Encoder], template: str) -> None:
    encoder = with_template(encoder_of("qwen3_vl"), template)
    row = tiny.record("Why?", "<think>\nIt is so.\n</think>\n\nRed")
    text, [(begin, end)] = encoder.render(row, answered=True)
    assert text.count("<think>") == 1
    assert text[begin:end] == "It is so.\n</think>\n\nRed<|im_end|>"
    check_labels(encoder, [row])


def test_an_answer_without_reasoning_closes_what_the_prompt_opened(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = with_template(encoder_of("qwen3_vl"), THINKING)
    assert encoder.supervised_texts(tiny.record("Why?", "Red")) == ["\n</think>\n\nRed<|im_end|>"]


def test_reasoning_that_the_template_drops_of_earlier_turns_is_dropped(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = with_template(encoder_of("qwen3_vl"), THINKING)
    row = tiny.record("And?", "Blue", earlier=[("Why?", "<think>\nso\n</think>\n\nRed")])
    assert "so\n" not in encoder.render(row, answered=True)[0]
    both = with_template(encoder_of("qwen3_vl"), THINKING, supervise="all")
    assert both.supervised_texts(row)[0] == "Red<|im_end|>"


def test_an_answer_that_the_template_cuts_is_trained_whole(encoder_of: Callable[[str], Encoder]) -> None:
    template = THINKING.replace("{{ text }}<|im_end|>", "{{ text[:8] }}<|im_end|>")
    encoder = with_template(encoder_of("qwen3_vl"), template)
    [text] = encoder.supervised_texts(tiny.record("Why?", "a long answer"))
    assert "a long answer" in text


# ---------------------------------------------------------------- a model's own tokens in texts


def added_to(encoder: Encoder, *tokens: str, special: bool = True) -> Encoder:
    """The encoder of a processor whose tokenizer has more special tokens, as grounding checkpoints do."""
    processor = copy.deepcopy(encoder.processor)
    processor.tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return Encoder(processor)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "smolvlm", "gemma3", "llava"])
@pytest.mark.parametrize("special", [True, False])
def test_a_models_own_tokens_in_answers_are_these_tokens(
    encoder_of: Callable[[str], Encoder], family: str, special: bool
) -> None:
    own = ("<|object_ref_start|>", "<|object_ref_end|>", "<point>", "<|quad_start|>")
    encoder = added_to(encoder_of(family), *own, special=special)
    row = tiny.record("Where is <point>?", "<|object_ref_start|>cat<|object_ref_end|> <|quad_start|>(1,2)")
    encoded = encoder.encode([row], answered=True)
    numbers = [encoder.tokenizer.convert_tokens_to_ids(token) for token in own]
    assert [i for i in encoded.labels[0] if i in numbers] == [numbers[0], numbers[1], numbers[3]]
    assert encoded.input_ids[0].count(numbers[2]) == 1
    check_labels(encoder, [row])
    answer = [i for i in encoded.labels[0] if i != IGNORE]
    [text] = encoder.answers.decode([answer])
    assert "".join(text.split()) == "<|object_ref_start|>cat<|object_ref_end|><|quad_start|>(1,2)", "and read back"


def test_locations_in_paligemma_are_locations(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = encoder_of("paligemma2")
    row = tiny.record("detect cat", "<loc0001><loc0002> cat <seg003>")
    labels = encoder.encode([row], answered=True).labels[0]
    wanted = encoder.tokenizer.convert_tokens_to_ids(["<loc0001>", "<loc0002>", "<seg003>"])
    assert [i for i in labels if i in wanted] == wanted
    check_labels(encoder, [row])


def test_what_steers_or_shows_stays_text(encoder_of: Callable[[str], Encoder]) -> None:
    for family, marks in {
        "qwen2_vl": ["<|im_end|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"],
        "smolvlm": ["<row_3_col_4>", "<global-img>", "<fake_token_around_image>", "<end_of_utterance>"],
        "internvl": ["<img>", "</img>", "<IMG_CONTEXT>"],
        "gemma3": ["<start_of_turn>", "<start_of_image>", "<eos>"],
        "idefics": ["<end_of_utterance>", "<image>", "</s>"],
    }.items():
        encoder = encoder_of(family)
        plain = encoder.encode([tiny.record("a", "b")], answered=True).input_ids[0]
        for mark in marks:
            number = encoder.tokenizer.convert_tokens_to_ids(mark)
            ids = encoder.encode([tiny.record(f"a {mark}", f"b {mark}")], answered=True).input_ids[0]
            assert ids.count(number) == plain.count(number), (family, mark)
            assert encoder.prompt.markers.kept_as_text(f"a {mark}") == [mark]


def test_the_proof_finds_letters_in_place_of_tokens(
    encoder_of: Callable[[str], Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both decode to the same text."""
    encoder = added_to(encoder_of("qwen2_vl"), "<|box_start|>")
    row = tiny.record("Where?", "<|box_start|>(1,2)")
    letters = encoder.prompt.markers.literal
    monkeypatch.setattr(encoder.prompt.markers, "is_control", lambda marker: True)
    assert letters("<|box_start|>") != "<|box_start|>"
    [wrong] = encoder.encode([row], answered=True).labels
    monkeypatch.undo()
    encoder.prompt.write.remembered.cache_clear()
    right = encoder.encode([row], answered=True)
    right.labels = [wrong]
    monkeypatch.setattr(encoder, "encode", lambda rows, answered: right)
    with pytest.raises(DataError, match="the added tokens of the answer are encoded as other tokens"):
        check_labels(encoder, [row])
