"""Renders a row with the model's own chat template, and finds the characters that are trained on.

Each row is rendered by the template itself, so everything it does to a text (strip it, drop the reasoning of earlier
answers) is applied here too. Answers are located by rendering once more with a stand-in instead of the answer: the text
before and after the stand-in is the text before and after the answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from vlmtune.data.records import Record, Turn
from vlmtune.errors import DataError, ModelError
from vlmtune.memo import Memo
from vlmtune.prompt.markers import Markers
from vlmtune.prompt.template import TEXT, Shape, content_of, conversation

Spans = list[tuple[int, int]]
STAND_IN = TEXT.format("")
ONE_QUESTION: Shape = (False, ("it",))
"""One question about one image."""


class Ending(NamedTuple):
    """The text that the template writes after the last answer."""

    whole: str
    marker: str
    """The part up to and including its first marker; empty if there is none."""


class Prompt:
    """Renders rows for one processor. Control markers in a user's text stay text (`markers`).

    `supervise`: which turns are trained on, the `last` or `all`.
    """

    def __init__(self, processor: Any, family: Any, system_prompt: str | None, supervise: str):
        self.processor, self.family = processor, family
        self.system_prompt, self.supervise = system_prompt, supervise
        self.markers = Markers(processor, family)
        self.tokenizer = self.markers.tokenizer
        self.ending = Memo(self._ending)
        self.write = Memo(self._write, most=100_000)
        self.in_front = Memo(self._in_front)

    # ---------------------------------------------------------------- a conversation

    def system(self, record: Record) -> str | None:
        return record.system if record.system is not None else self.system_prompt

    def shape(self, record: Record) -> Shape:
        """Everything about a row that affects its rendering, except its texts."""
        with_system, images, turns = self.system(record) is not None, len(record.images), record.turns
        if len(turns) == 1 and not turns[0].image_at:  # nearly every row: images first, then the question
            return with_system, ("i" * images + "t",)
        placed = sum(len(turn.image_at) for turn in turns)
        if placed not in (0, images):
            raise DataError(f"{record.place}: {images} images for {placed} placeholders in the text")
        orders = ["".join(kind for kind, _ in content_of(turn)) for turn in turns]
        return with_system, ("i" * (images - placed) + orders[0], *orders[1:])

    def check(self, record: Record) -> None:
        """Raise DataError if the template refuses such a conversation, whatever its texts are."""
        shape = self.shape(record)
        try:
            self.ending(shape)
        except DataError as error:
            raise DataError([f"{record.place}: {problem}" for problem in error.problems]) from error

    def of(self, record: Record, *, answered: bool) -> tuple[str, Spans]:
        """The text of a row with image placeholders, and the character spans that are trained on."""
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
        """A row as messages in transformers' format."""
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append(_message("system", [("t", self.markers.literal(system))]))
        for order, turn in zip(shape[1], turns, strict=True):
            own = [(kind, self.markers.literal(text)) for kind, text in content_of(turn)]
            leading = [("i", "")] * (len(order) - len(own))
            messages.append(_message("user", leading + own))
            messages.append(
                _message("assistant", [("t", self.markers.literal(turn.answers[0] if turn.answers else ""))])
            )
        return messages

    def rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """`messages` rendered by the template. Raises DataError if the template refuses them."""
        from jinja2 import TemplateError

        try:
            return str(self.processor.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise DataError(f"this model's chat template refuses the conversation: {error}") from error

    # ---------------------------------------------------------------- where answers are

    def _ending(self, shape: Shape) -> Ending:
        """The text after the last answer of such a conversation. Also checks that the template writes all texts."""
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
        ends = [marker for marker in self.markers.names if marker in tail and marker != self.family.image_token]
        return Ending(tail, min((tail[: tail.index(end) + len(end)] for end in ends), key=len, default=""))

    def own_end(self) -> str:
        """The tokenizer's end token, without which the model would not learn to stop (llava-1.5's template writes
        none).
        """
        end = self.processor.tokenizer.eos_token
        if not end:
            raise ModelError("neither the chat template nor the tokenizer has a token that ends an answer")
        return str(end)

    def _last(self, messages: list[dict[str, Any]], prompt: str, ending: Ending) -> str:
        """The text of the last answer after the prompt, without the end.

        It is the template's own text, which may begin with a separator. If it does not continue the generation prompt
        (LLaVA-OneVision writes an extra space before given answers), the generation prompt takes precedence.
        """
        answer = messages[-1]["content"][0]["text"]
        full = self.rendered(messages).removesuffix(ending.whole)
        if full.startswith(prompt) and _ends_with(full, answer):
            return full[len(prompt) :]
        head = self._marked(messages, len(messages) - 1)[0]
        if full.startswith(head) and _ends_with(full[len(head) :], answer):
            return full[len(head) :]
        opening = prompt[_common(prompt, head) :].strip()  # part of the answer, such as `<think>`
        return answer.removeprefix(opening).lstrip("\n") if opening else answer

    def _earlier(self, messages: list[dict[str, Any]], prompt: str, ending: Ending) -> Spans:
        """The spans of the earlier answers in `prompt`, including the separators and end tokens that it writes."""
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
        """The text that the template writes before and after message `at`, which is an answer."""
        marked = [*messages[:at], _message("assistant", [("t", STAND_IN)]), *messages[at + 1 :]]
        head, _, tail = self.rendered(marked, **options).partition(STAND_IN)
        return head, tail

    # ---------------------------------------------------------------- shared prefixes

    def group(self, record: Record) -> Hashable:
        """Equal for rows whose prompts are the same up to the last image; None if a row shares with no other.

        Rows can't share an earlier answer that is trained on, nor anything after it.
        """
        if record.group is None:
            return None
        in_front, texts = self.in_front(self.shape(record))
        if texts is None:
            return None
        own = [] if (system := self.system(record)) is None else [system]
        for turn in record.turns if texts and max(texts) >= len(own) else ():
            own += [text for kind, text in content_of(turn) if kind == "t"] + list(turn.answers[:1])
        return (record.group, in_front, *(own[number] for number in texts))

    def _in_front(self, shape: Shape) -> tuple[str, list[int] | None]:
        """The template's text up to the last image, and the numbers of the texts in it; None if one of them is trained
        on.
        """
        messages, kinds = conversation(shape)
        prompt = self.rendered(messages[:-1], add_generation_prompt=True)
        head = prompt.rpartition(self.family.image_token or "\0")[0]
        texts = [number for number in range(len(kinds)) if TEXT.format(number) in head]
        trained = self.supervise == "all" and any(kinds[number] == "answer" for number in texts)
        return head, None if trained else texts


def _message(role: str, content: Sequence[tuple[str, str]]) -> dict[str, Any]:
    parts = [{"type": "image"} if kind == "i" else {"type": "text", "text": text} for kind, text in content]
    return {"role": role, "content": parts}


def _ends_with(text: str, answer: str) -> bool:
    """Whether an answer is complete, ignoring white space."""
    return "".join(text.split()).endswith("".join(answer.split()))


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
