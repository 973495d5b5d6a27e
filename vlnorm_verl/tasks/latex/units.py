"""What a text behind a value makes of it: a unit is dropped, a number word ("million", "tenths") is a factor."""

from __future__ import annotations

import itertools
import re
from typing import Any

from sympy import Rational

from vlnorm_verl.tasks.latex.tokens import UNIT_LETTERS, word_set
from vlnorm_verl.tasks.latex.values import AM, PERCENT, PM, Unreadable

# Factors; "second" is a unit of time.
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "quadrillion": 15, "crore": 7}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"  # of 2, 3, …
_SCALES = {part: Rational(1, number) for number, part in enumerate(_PARTS.split(), start=2)}
_SCALES |= {word: Rational(10**power) for word, power in _POWERS.items()}
_SCALES |= {f"{word}th": Rational(1, 10**power) for word, power in _POWERS.items()}
_SCALES |= {"halve": Rational(1, 2), "quarter": Rational(1, 4), "dozen": Rational(12), "lakh": Rational(10**5)}
_SCALES |= {f"{word}s": scale for word, scale in _SCALES.items()} | {"tens": Rational(10)}
_UNIT_CHARACTERS = "a-zμ°ωå"
# Words that make something else of the number before them than so many of a unit.
_NO_UNITS = word_set(
    "or and not no if when where for mod modulo base except times plus minus over to than unless is are nor but of the"
    " squared cubed doubled tripled halved repeating remainder bc bce ad factorial below above under infinity gross"
)
_NO_UNITS |= _SCALES.keys()  # where one is not the first word, and so no factor
_OF_NO_UNIT = re.compile(
    rf"[^{_UNIT_CHARACTERS}'-]|(?:twen|thir|fou?r|fif|six|seven|eigh|nine)t(?:y|ie|ee)"  # fifty, fiftieth, fifteen
    "|^(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)$"  # not the "two-" of two-digit
)


def without_unit(value: Any, text: str) -> Any:
    """The value in front of a text: with its percent, its a.m. and its number words, without its unit.

    Raises:
        Unreadable: the text is something else.
    """
    without_exponents = re.sub(rf"(?<=[{_UNIT_CHARACTERS}])\^?\{{?-?\d\}}?(?!\w)", "", text)
    words = [word.strip(".,()") for word in re.split(r"[\s/~]+|(?<=-)", without_exponents)]
    bare = text.strip("(). ")
    if bare in ("percent", "percentage", "per cent", "pct", "%"):
        return value * PERCENT
    if bare in ("am", "pm"):
        return value + (AM if bare == "am" else PM)
    if len(text) == 1 and text.upper() not in UNIT_LETTERS:
        raise Unreadable(f"{text!r} after a value")
    scales = [_SCALES[word] for word in itertools.takewhile(_SCALES.__contains__, words)]
    del words[: len(scales)]
    for scale in scales:
        value = value * scale
    unclear = len(scales) > 1 and min(scales) < 1  # hundred thousandths: 100/1000 or 1/100000
    unclear |= not _NO_UNITS.isdisjoint(word.strip("-") for word in words) or words[-1:] == ["negative"]
    if unclear or any(map(_OF_NO_UNIT.search, words)):
        raise Unreadable(f"{text!r} after a value")
    return value
