"""Reads the text of a Math answer, LaTeX or plain, into sympy objects: all of it, or not at all.

`latex.tokens` makes tokens of it, `latex.formulas` values of these.
"""

from __future__ import annotations

from typing import Any

from vlnorm_verl.tasks.latex.formulas import Parser
from vlnorm_verl.tasks.latex.tokens import is_ambiguous, rewritten, tokens_of, words
from vlnorm_verl.tasks.latex.values import ERRORS, Answer


def read(text: str) -> Answer:
    """The answer that a text is. One of which a part was not understood is not ``readable``."""
    text = rewritten(text)
    tokens = tokens_of(text)
    letters = words(tokens)
    prose = letters is not None and any(token.kind == "text" for token in tokens)
    readings: list[Any] = []
    decimal = False
    ways = [False, True] if is_ambiguous(text) else [False]
    for second in [] if prose else ways:
        parser = Parser(tokens_of(text, second), second)
        try:
            value = parser.answer()
        except ERRORS:
            continue
        decimal |= parser.decimal
        if value not in readings:
            readings.append(value)
    canonical = " ".join(token.text for token in tokens)
    if any(token.kind == "text" for token in tokens):
        canonical = " ".join(canonical.casefold().split())
    return Answer(canonical, letters, prose, tuple(readings), decimal)
