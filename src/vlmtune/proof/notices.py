"""What a user should know of their rows, although nothing is wrong with them."""

from __future__ import annotations

import logging
import re
from collections import Counter

from vlmtune.data.marks import PLACE
from vlmtune.data.splits import Split
from vlmtune.prompt.encode import Encoder
from vlmtune.proof.row_checker import texts_of

log = logging.getLogger("vlmtune")


def log_date(encoder: Encoder) -> None:
    """Log if prompts contain the current date: it then differs between training and prediction."""
    if "strftime_now" in str(encoder.processor.chat_template):
        log.info("this model's chat template writes today's date into prompts; it will differ in later predictions")


def log_markers(encoder: Encoder, splits: dict[str, Split]) -> None:
    """Log how many rows contain control markers, which stay text: injected ones, or meant as image placeholders."""
    prompt, counts = encoder.prompt, Counter[str]()
    starts = re.compile("|".join(map(re.escape, {PLACE, *prompt.markers.names})))
    for split in splits.values():
        for record in () if split.records.on_demand else split.records:
            texts = "\n".join(texts_of(record))
            if starts.search(texts):
                counts.update({*prompt.markers.kept_as_text(texts), *([PLACE] if PLACE in texts else [])})
    if counts:
        found = ", ".join(f"{marker} in {count} rows" for marker, count in counts.most_common())
        images = PLACE in counts or encoder.family.image_token in counts
        log.log(
            logging.WARNING if images else logging.INFO,
            "control markers in texts are read as plain text: %s%s",
            found,
            f'; to show an image at {PLACE}, give its path as a list: ["a.png"]' if images else "",
        )


def warn_of_long_references(encoder: Encoder, splits: dict[str, Split], most: int) -> None:
    """Warn of evaluated rows whose references are longer than `generation.max_new_tokens`."""
    records = [r for name in ("validation", "test") if name in splits for r in splits[name].records]
    long = [min(r.answers, key=len) for r in records if r.answers and min(len(a.encode()) for a in r.answers) > most]
    found = encoder.tokenizer(long, add_special_tokens=False)["input_ids"] if long else []
    cut = [len(ids) + 1 for ids in found if len(ids) + 1 > most]  # plus an end token
    if cut:
        log.warning(
            "generation.max_new_tokens=%d is too small for the references of %d of %d evaluated rows (up to %d "
            "tokens): their answers will be cut off",
            most,
            len(cut),
            len(records),
            max(cut),
        )
