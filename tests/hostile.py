r"""Hostile answers: what a model could write to hang, crash or fool a reward. Seeded: a failure can be repeated.

Each generator takes a `random.Random` and returns the inside of ``<answer>…</answer>`` or of ``\boxed{…}``.
`responses` puts them into responses, some of which are cut or nested at the tags too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

Generator = Callable[[random.Random], str]

# Arabic-Indic, Devanagari, full-width, mathematical bold, superscript and circled digits; a fraction; a Roman numeral.
UNICODE_DIGITS = "٣४３𝟑³③½Ⅲ"
ODD_CHARACTERS = "\x00\x0b\x0c\x1c\x85\xa0\u2028\u2212\u00d7\u00f7\u200b\ufeff\ud800\U0001f600"
FORMAT_BOMBS = (
    "%s%n",
    "{0.__class__.__mro__}",
    "{:>9999999999}",
    "%9999999999d",
    "${IFS}",
    "\\x41",
    "{{7*7}}",
    "f'{1}'",
)
CODE = ("__import__('os')", "().__class__", "[x for x in ()]", "lambda:0", "exec('1')", "1;1", "a:=1", "1 if 1 else 2")

SYMBOLS = "0123456789+-*/(). \t"
# LaTeX's whole vocabulary of trouble: towers, factorials, sums, integrals, roots, relations, sets, matrices.
LATEX = (
    r"\frac{#}{#}", r"\sqrt{#}", r"\sqrt[#]{#}", "{#}^{#}", "{#}_{#}", "#!", r"\binom{#}{#}", r"\left(#\right)", r"|#|",
    r"\sum_{n=1}^{#}{#}", r"\prod_{n=1}^{#}{n}", r"\int_0^1 {#} dx", r"\lim_{x\to 0}{#}", r"\log_{#}{#}", r"\sin{#}",
    r"\{#,#\}", r"[#,#)", r"#=#", r"#<#", r"\text{#}", r"\begin{pmatrix}#&#\\#&#\end{pmatrix}", r"#\cup #", r"#\pm #",
    r"#\times #", r"#,\ #", r"#\%", r"\boxed{#}", r"\mathrm{#}", r"\overline{#}", r"#\text{ cm}^2", r"$#$", r"#:#",
)  # fmt: skip
ATOMS = ("0", "1", "7", "x", "y", r"\pi", r"\infty", "e", "i", "0.5", "99999", r"\emptyset", "", "1e9", r"\theta", "A")


def tower(rng: random.Random) -> str:
    """9**9**9…, and its neighbours."""
    return rng.choice(("**", "^", "//", "<<", "*", "!^")).join(
        str(rng.randint(2, 99)) for _ in range(rng.randint(2, 60))
    )


def brackets(rng: random.Random) -> str:
    opening, closing = rng.choice(("()", "[]", "{}", "<>"))
    # Mostly below the length limits, where the parser has to cope with them, and up to 10^5.
    depth = int(10 ** rng.uniform(0, 2.4)) if rng.random() < 0.9 else 10**5
    return opening * depth + "1" + closing * (depth - rng.choice((0, 0, 1, -1)))


def signs(rng: random.Random) -> str:
    return (
        "".join(rng.choice("+-~") if rng.random() < 0.02 else "-" for _ in range(int(10 ** rng.uniform(0, 2.4)))) + "1"
    )


def huge_integer(rng: random.Random) -> str:
    digits = int(10 ** rng.uniform(1, 3)) if rng.random() < 0.9 else 10**5
    return rng.choice(("", "-", "0", "0x", "1e", "1.")) + "9" * digits


def unicode_digits(rng: random.Random) -> str:
    return "".join(rng.choice(UNICODE_DIGITS + "12+*") for _ in range(rng.randint(1, 30)))


def soup(rng: random.Random) -> str:
    return "".join(rng.choice(SYMBOLS) for _ in range(rng.randint(0, 300)))


def odd_characters(rng: random.Random) -> str:
    return "".join(rng.choice(SYMBOLS + ODD_CHARACTERS) for _ in range(rng.randint(1, 60)))


def text_bomb(rng: random.Random) -> str:
    return rng.choice(FORMAT_BOMBS + CODE) * rng.choice((1, 1, 2, 50, 5000))


def expression(rng: random.Random) -> str:
    """Well-formed or nearly: the parser's own ground."""
    text = str(rng.randint(0, 99))
    for _ in range(rng.randint(0, 12)):
        text += rng.choice((" + ", "-", "*", " / ", "**", "//", "", ".", ") + (", "--")) + str(rng.randint(0, 99))
        if rng.random() < 0.3:
            text = f"({text})"
    return text


def nested_latex(rng: random.Random) -> str:
    """One construct inside another, or the same one many times."""
    same = rng.choice(LATEX) if rng.random() < 0.2 else None
    text = rng.choice(ATOMS)
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 30))):
        outer = same or rng.choice(LATEX)
        for part in range(outer.count("#")):
            outer = outer.replace("#", text if part == 0 else rng.choice(ATOMS), 1)
        text = outer
    return text


def broken_latex(rng: random.Random) -> str:
    text = nested_latex(rng)
    cut = rng.randrange(len(text) + 1)
    return text[:cut] + rng.choice(("", "\\", "}", "{", "^", "_", "&", "$", "\\left", "\\frac")) + text[cut + 1 :]


ARITHMETIC: tuple[Generator, ...] = (
    tower, brackets, signs, huge_integer, unicode_digits, soup, odd_characters, text_bomb, expression, expression,
)  # fmt: skip
MATHS: tuple[Generator, ...] = (*ARITHMETIC, *[nested_latex] * 6, *[broken_latex] * 4)


def responses(count: int, seed: int, opening: str, closing: str, generators: tuple[Generator, ...]) -> Iterator[str]:
    """``count`` responses whose answer is between ``opening`` and ``closing``."""
    rng = random.Random(f"hostile-{seed}")
    for generator in itertools.islice(itertools.cycle(generators), count):
        answer = generator(rng)
        shape = rng.random()
        if shape < 0.9:
            yield f"thinking\n{opening}{answer}{closing}"
        elif shape < 0.94:
            yield opening * rng.choice((1, 3, 10_000)) + answer + closing * rng.choice((0, 1, 10_000))
        elif shape < 0.97:
            yield f"{opening}{answer}{closing}\n" * 3 + " " * 10_000
        else:
            yield f"{answer}{closing}{opening}{opening[: len(opening) // 2]}"
