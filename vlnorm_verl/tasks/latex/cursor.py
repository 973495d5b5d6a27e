"""A place in the tokens of a text, and what the grammar remembers on its way."""

from __future__ import annotations

from vlnorm_verl.tasks.latex.tokens import Token
from vlnorm_verl.tasks.latex.values import Unreadable

END = Token("end of text", "")


class Cursor:
    """
    Args:
        tokens: of `tokens.tokens_of`.
        second: whether they are to be read in the second way, where the notation has two meanings.
        functions: whether f(x) is a value of a function, else f times x.
        angle: whether degrees are read in radians, as they are in a sine; else they are dropped.
    """

    def __init__(self, tokens: list[Token], second: bool, functions: bool, angle: bool) -> None:
        self.tokens = tokens
        self.position = 0
        self.second = second
        self.functions = functions
        self.decimal = False
        self.called = False  # whether there was a value of a function
        self.sign = 1  # what \pm stands for
        self.signs = False  # whether there was one
        self.either = False  # whether there was an "or" between values
        self.bars = 0  # open |
        self.angle = angle
        self.indices: set[str] = set()  # of the sums around

    def peek(self, ahead: int = 0) -> Token:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def accept(self, *texts: str) -> str:
        token = self.peek()
        if token.kind in ("mark", "command") and token.text in texts:
            self.position += 1
            return token.text
        return ""

    def expect(self, *texts: str) -> str:
        text = self.accept(*texts)
        if not text:
            raise Unreadable(f"{self.peek().text!r} instead of {' or '.join(texts)}")
        return text

    def raw(self) -> str:
        """The text of a group or of one token, without braces and white space."""
        if not self.accept("{"):
            return self.next().text.lstrip("\\")
        parts = []
        while not self.accept("}"):
            if self.peek() is END:
                raise Unreadable("a group without an end")
            parts.append(self.raw())
        return "".join(parts)
