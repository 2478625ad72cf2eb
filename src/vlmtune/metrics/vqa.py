"""VQA's accuracy as its authors' evaluation computes it, quirks included.

Source: Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837; and the code that the leaderboard
runs, github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH_PEOPLE = 4
"""From so many references on the published formula can reach 1."""

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32
"""The published code passes a flag of `re`, whose value is 32, where the number of replacements goes."""

# The pairs of its table that change a word in lower case: what is written, and what takes its place.
_PAIRS = """
    aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
    didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't
    havent haven't hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's isnt isn't
    itd it'd itd've it'd've it'dve it'd've itll it'll maam ma'am mightnt mightn't mightnt've mightn't've
    mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock
    oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've
    shouldve should've shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd
    somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's
    someoned someone'd someoned've someone'd've someone'dve someone'd've someonell someone'll someones someone's
    somethingd something'd somethingd've something'd've something'dve something'd've somethingll something'll
    thats that's thered there'd thered've there'd've there'dve there'd've therere there're theres there's
    theyd they'd theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas
    wasnt wasn't wed've we'd've we'dve we'd've weve we've werent weren't whatll what'll whatre what're whats what's
    whatve what've whens when's whered where'd wheres where's whereve where've whod who'd whod've who'd've
    who'dve who'd've wholl who'll whos who's whove who've whyll why'll whyre why're whys why's wont won't
    wouldve would've wouldnt wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll
    y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've
    you'dve you'd've youll you'll youre you're youve you've
"""
CONTRACTIONS = dict(zip(_PAIRS.split()[::2], _PAIRS.split()[1::2], strict=True))


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA's accuracy: an answer is right when three of the people asked gave it, and in part when fewer did.

    One person is left out in turn and the scores min(matches / 3, 1) against the others are averaged. From four
    references on (VQA has ten) the value is that of the published evaluation to the letter:

    - The prediction loses punctuation (decimal points, `%`, `$`, `:` and apostrophes stay), case and articles; number
      words up to ten become digits, and contractions get their apostrophe.
    - References lose punctuation alone, and only where they are not all equal. They are taken to be in lower case,
      without articles and in digits, as VQA's are; `vqa_accuracy_lenient` is for references as people write them.

    With fewer references the published value cannot reach 1 (one reference always scores 0). There both sides are
    processed as the prediction is, and the divisor is the number of people left: three references score matches / 3,
    two score matches / 2, and one is a comparison.

    >>> vqa_accuracy("Two dogs.", ["2 dogs"] * 3 + ["dogs"] * 7)
    0.9
    """
    if len(references) < ENOUGH_PEOPLE:
        return vqa_accuracy_lenient(prediction, references)
    people = list(references)
    if len(set(people)) > 1:
        people = [without_punctuation(reference) for reference in people]
    return _left_out_in_turn(people.count(processed(prediction)), len(people))


def vqa_accuracy_lenient(prediction: str, references: Sequence[str]) -> float:
    """`vqa_accuracy` with every reference processed as the prediction is: its case, articles and number words too.

    Not a published metric. For references that were not written to VQA's rules; on VQA's own the two hardly differ.
    """
    answer = processed(prediction)
    return _left_out_in_turn(sum(answer == processed(reference) for reference in references), len(references))


def _left_out_in_turn(matches: int, people: int) -> float:
    """Mean of min(matches / 3, 1) with each of `people` left out once; the divisor is at most the people left."""
    enough = max(min(3, people - 1), 1)
    if people == 1:
        return float(matches)
    agrees = min((matches - 1) / enough, 1) * matches
    differs = min(matches / enough, 1) * (people - matches)
    return (agrees + differs) / people


def processed(text: str) -> str:
    """A prediction as the published evaluation compares it.

    >>> processed("At the 4 p.m. show, don't!")
    "at 4 pm show don't"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (DIGITS.get(word, word) for word in without_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text: str) -> str:
    """Drop a sign that stands beside a space anywhere in the text, and every sign where a number holds a comma; put a
    space in place of any other. A period goes unless a digit follows.
    """
    out, in_number = text, COMMA_IN_NUMBER.search(text)
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if beside_space or in_number else " ")
    return PERIOD.sub("", out, count=MOST_PERIODS)
