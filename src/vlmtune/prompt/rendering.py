"""A row as the model's own chat template writes it, with the characters that are trained on.

Each row is rendered by the template itself, so whatever it does to a text (strip it, drop the reasoning of earlier
answers) is done here too. Answers are found again by rendering once more with a stand-in in an answer's place: what
stands before and behind the stand-in, stands before and behind the answer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError, ModelError
from vlmtune.prompt.template import TEXT, Shape, content_of, conversation, with_stand_ins

Spans = list[tuple[int, int]]
STAND_IN = TEXT.format("")
ONE_QUESTION: Shape = (False, ("it",))
"""One question about one image."""


class Ending(NamedTuple):
    """What the template writes behind the last answer."""

    whole: str
    marker: str
    """Up to and with its first marker; empty where it writes none."""


class Prompt:
    """Writes rows for one processor.

    A control marker (`<|im_end|>`, `<image>`) inside a user's text stays text: its first character is replaced by a
    stand-in that the tokenizer's normalizer turns back after special tokens were looked for. Control markers are what
    the template itself writes, what stands for images, and the tokenizer's named tokens (begin, end, padding). Other
    added tokens (boxes, references, locations, points, reasoning) in a text are those tokens.

    `supervise`: the turns that are trained on, the `last` or `all`.
    """

    def __init__(self, processor: Any, family: Any, system_prompt: str | None, supervise: str):
        self.processor, self.family = processor, family
        self.system_prompt, self.supervise = system_prompt, supervise
        self.special = {t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
        own = {family.image_token or "<image>", family.feature_token, *family.ends}
        self.markers = sorted(self.special | own)
        """Strings that mean something else than their letters to the tokenizer or the processor."""
        self._always = own | self._named()
        self.tokenizer, self.stand_ins = with_stand_ins(processor.tokenizer, self.markers)
        self._letters = str.maketrans({stand_in: first for first, stand_in in self.stand_ins.items()})
        self._marker = re.compile("|".join(sorted(map(re.escape, self.markers), key=len, reverse=True)))
        self.ending = functools.cache(self._ending)
        self.write = functools.lru_cache(maxsize=100_000)(self._write)

    # ---------------------------------------------------------------- markers

    def _named(self) -> set[str]:
        """Tokens that the tokenizer or the processor has a name for: begin, end, padding, image, video."""
        named = {value for value in self.processor.tokenizer.special_tokens_map.values() if isinstance(value, str)}
        return named | {v for k, v in vars(self.processor).items() if k.endswith("_token") and isinstance(v, str)}

    def is_control(self, marker: str) -> bool:
        """Whether `marker` steers the conversation or stands for an image, and so stays text in a user's text."""
        if marker in self._always or marker in str(self.processor.chat_template):
            return True
        return _numberless(marker) in self._around_images

    @functools.cached_property
    def _around_images(self) -> set[str]:
        """Markers that images expand to, their numbers left out (`<row_1_col_2>`)."""
        sides = ((64, 64), (2000, 500), (500, 2000))
        _, expansions = self.family.images([[Image.new("RGB", size)] for size in sides])
        return {_numberless(found) for text in expansions for found in self._marker.findall(text)}

    def literal(self, text: str) -> str:
        """`text` with stand-ins, so that no control marker in it takes effect."""
        at = 0
        while match := self._marker.search(text, at):
            at = match.start()
            if self.is_control(match[0]):
                text = text[:at] + self.stand_ins[text[at]] + text[at + 1 :]
            else:
                at = match.end()
        return text

    def as_written(self, text: str) -> str:
        """`text` with the letters that stand-ins are for."""
        return text.translate(self._letters)

    def kept_as_text(self, text: str) -> list[str]:
        """The control markers in a user's text."""
        return [found for found in self._marker.findall(text) if self.is_control(found)]

    # ---------------------------------------------------------------- a conversation

    def system(self, record: Record) -> str | None:
        return record.system if record.system is not None else self.system_prompt

    def shape(self, record: Record) -> Shape:
        """What of a row decides how the template treats it, its texts aside."""
        with_system, images, turns = self.system(record) is not None, len(record.images), record.turns
        if len(turns) == 1 and not turns[0].image_at:  # nearly every row: its images, then its question
            return with_system, ("i" * images + "t",)
        placed = sum(len(turn.image_at) for turn in turns)
        if placed not in (0, images):
            raise DataError(f"{record.place}: {images} images for {placed} places in the text")
        orders = ["".join(kind for kind, _ in content_of(turn)) for turn in turns]
        return with_system, ("i" * (images - placed) + orders[0], *orders[1:])

    def check(self, record: Record) -> None:
        """Raise DataError where the template refuses such a conversation, whatever its texts hold."""
        shape = self.shape(record)
        try:
            self.ending(shape)
        except DataError as error:
            raise DataError([f"{record.place}: {problem}" for problem in error.problems]) from error

    def of(self, record: Record, *, answered: bool) -> tuple[str, Spans]:
        """The text of a row with placeholders for its images, and the characters that are trained on."""
        shape = self.shape(record)
        try:
            text, spans = self.write(shape, self.system(record), record.turns, answered)
        except DataError as error:
            raise DataError([f"{record.place}: {problem}" for problem in error.problems]) from error
        return text, list(spans)

    def _write(
        self, shape: Shape, system: str | None, turns: tuple[Turn, ...], answered: bool
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        messages = self._messages(shape, system, turns)
        prompt = self.rendered(messages[:-1], add_generation_prompt=True)
        if not answered:
            return prompt, ()
        ending = self.ending(shape)
        own_end = self.own_end() if not ending.marker else ""
        answer = self._last(messages, prompt, ending) + (ending.marker or own_end)
        earlier = self._earlier(messages, prompt, ending) if self.supervise == "all" else []
        spans = [span for span, turn in zip(earlier, turns, strict=False) if turn.trained]
        for number, (begin, end) in enumerate(spans if own_end else []):
            shift = number * len(own_end)
            begin, end = begin + shift, end + shift
            prompt = prompt[:end] + own_end + prompt[end:]
            spans[number] = (begin, end + len(own_end))
        last = [(len(prompt), len(prompt + answer))] if turns[-1].trained or self.supervise == "last" else []
        return prompt + answer, (*spans, *last)

    def _messages(self, shape: Shape, system: str | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """A row in transformers' form."""
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append(_message("system", [("t", self.literal(system))]))
        for order, turn in zip(shape[1], turns, strict=True):
            own = [(kind, self.literal(text)) for kind, text in content_of(turn)]
            leading = [("i", "")] * (len(order) - len(own))
            messages.append(_message("user", leading + own))
            messages.append(_message("assistant", [("t", self.literal(turn.answers[0] if turn.answers else ""))]))
        return messages

    def rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """What the template makes of `messages`. Raises DataError where it refuses them."""
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise DataError(f"this model's chat template refuses the conversation: {error}") from error

    # ---------------------------------------------------------------- where answers stand

    def _ending(self, shape: Shape) -> Ending:
        """What follows the last answer of such a conversation; all its texts are looked for on the way."""
        messages, kinds = conversation(shape)
        texts = [TEXT.format(number) for number in range(len(kinds))]
        prompt = self.rendered(messages[:-1], add_generation_prompt=True)
        full = self.rendered(messages)
        counts = [prompt.count(text) for text in texts[:-1]] + [full.count(texts[-1])]
        if wrong := [kind for kind, count in zip(kinds, counts, strict=True) if count != 1]:
            if wrong == ["system"]:
                raise DataError("this model's chat template leaves out or repeats the system prompt")
            raise ModelError(f"this model's chat template leaves out or repeats the {wrong[0]}")
        tail = full.partition(texts[-1])[2]
        ends = [marker for marker in self.markers if marker in tail and marker != self.family.image_token]
        return Ending(tail, min((tail[: tail.index(end) + len(end)] for end in ends), key=len, default=""))

    def own_end(self) -> str:
        """The tokenizer's end, or the model never learns to stop (llava-1.5's template writes none)."""
        end = self.processor.tokenizer.eos_token
        if not end:
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer")
        return str(end)

    def _last(self, messages: list[dict[str, Any]], prompt: str, ending: Ending) -> str:
        """What stands for the last answer behind the prompt, its end left out.

        The template's own text, which may begin with a separator. Where that does not go on from the generation prompt
        (LLaVA-OneVision writes a space more before given answers), the generation prompt wins.
        """
        answer = messages[-1]["content"][0]["text"]
        full = self.rendered(messages).removesuffix(ending.whole)
        if full.startswith(prompt) and _ends_with(full, answer):
            return full[len(prompt) :]
        head = self._marked(messages, len(messages) - 1)[0]
        if full.startswith(head) and _ends_with(full[len(head) :], answer):
            return full[len(head) :]
        opening = prompt[_common(prompt, head) :].strip()  # of the answer, as `<think>`
        return answer.removeprefix(opening).lstrip("\n") if opening else answer

    def _earlier(self, messages: list[dict[str, Any]], prompt: str, ending: Ending) -> Spans:
        """Where the earlier answers stand in `prompt`, with separators and end tokens as far as it writes them."""
        spans = []
        for at in (n for n, message in enumerate(messages[:-1]) if message["role"] == "assistant"):
            head, tail = self._marked(messages[:-1], at, add_generation_prompt=True)
            if not (prompt.startswith(head) and prompt.endswith(tail) and len(head) + len(tail) <= len(prompt)):
                raise DataError("the chat template rewrites an earlier answer; train with data.supervise=last")
            before = self.rendered(messages[:at], add_generation_prompt=True)
            begin, end = len(before) if head.startswith(before) else len(head), len(prompt) - len(tail)
            spans.append((begin, end + (len(ending.marker) if tail.startswith(ending.marker) else 0)))
        return spans

    def _marked(self, messages: list[dict[str, Any]], at: int, **options: Any) -> tuple[str, str]:
        """What the template writes before and behind the answer that is message `at`."""
        marked = [*messages[:at], _message("assistant", [("t", STAND_IN)]), *messages[at + 1 :]]
        head, _, tail = self.rendered(marked, **options).partition(STAND_IN)
        return head, tail

    # ---------------------------------------------------------------- what rows share

    def group(self, record: Record) -> Hashable:
        """Equal for rows whose prompts are the same up to the last image; None where a row shares with no other.

        An earlier answer that is trained on ends what rows can share.
        """
        if record.group is None:
            return None
        in_front, texts = self._in_front(self.shape(record))
        if texts is None:
            return None
        own = [] if (system := self.system(record)) is None else [system]
        for turn in record.turns if texts and max(texts) >= len(own) else ():
            own += [text for kind, text in content_of(turn) if kind == "t"] + list(turn.answers[:1])
        return (record.group, in_front, *(own[number] for number in texts))

    @functools.cached_property
    def _in_front(self) -> Any:
        """Of a shape: what the template writes up to the last image, and the numbers of the texts in there; None where
        one of them is trained on.
        """

        @functools.cache
        def found(shape: Shape) -> tuple[str, list[int] | None]:
            messages, kinds = conversation(shape)
            prompt = self.rendered(messages[:-1], add_generation_prompt=True)
            head = prompt.rpartition(self.family.image_token or "\0")[0]
            texts = [number for number in range(len(kinds)) if TEXT.format(number) in head]
            trained = self.supervise == "all" and any(kinds[number] == "answer" for number in texts)
            return head, None if trained else texts

        return found


def expanded(text: str, spans: Spans, placeholder: str, expansions: Sequence[str]) -> tuple[str, Spans]:
    """`text` with the text of each image in place of its placeholder, and `spans` where they then are."""
    head, *rest = text.split(placeholder) if placeholder else [text]
    starts, out = [], head
    for expansion, part in zip(expansions, rest, strict=True):
        starts.append(len(out))
        out += expansion + part
    growth = [len(expansion) - len(placeholder) for expansion in expansions]
    return out, [(_moved(begin, starts, growth), _moved(end, starts, growth)) for begin, end in spans]


def _moved(at: int, starts: list[int], growth: list[int]) -> int:
    """Where a character is once placeholders have grown; `starts`: of the expansions, in the new text."""
    for start, more in zip(starts, growth, strict=True):
        if start < at:
            at += more
    return at


def _message(role: str, content: Sequence[tuple[str, str]]) -> dict[str, Any]:
    parts = [{"type": "image"} if kind == "i" else {"type": "text", "text": text} for kind, text in content]
    return {"role": role, "content": parts}


def _ends_with(text: str, answer: str) -> bool:
    """Whether nothing of an answer is missing, white space aside."""
    return "".join(text.split()).endswith("".join(answer.split()))


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _numberless(marker: str) -> str:
    return re.sub(r"\d+", "", marker)
