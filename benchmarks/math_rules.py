r"""Who is more lenient where: the Math reward, verl's math_verify reward and string rules, on golds spelled otherwise.

    python benchmarks/math_rules.py GOLDS [--every 1] [--examples 0]

GOLDS is a file or folder of a Math test set, as `vlnorm-verl data math` reads it (MATH500 is not in this repository).
Each gold is spelled in other ways that mean the same, and changed so that it means something else, as far as that is
possible by rules on the text; each rule grades ``\boxed{…}`` of that against the gold. The rules:

- ours: `vlnorm_verl.tasks.math`;
- math_verify: verl.utils.reward_score.math_verify;
- strings: the first step of the paper's code (Open-Reasoner-Zero's rules): equal texts, else 30 characters or less that
  are equal after verl's own string normalisation (of the same origin) or as floats. Its second step, sympy's reading of
  both, needs another antlr than math-verify and is left out: the code is a little more lenient than this column.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from origin import line

Spelling = Callable[[str], str]


def _replaced(pattern: str, replacement: str | Callable[[re.Match[str]], str], count: int = 0) -> Spelling:
    return lambda gold: re.sub(pattern, replacement, gold, count=count)


def _where(pattern: str, spelling: Spelling) -> Spelling:
    """The spelling of golds that match as a whole; others stay as they are, which drops them."""
    return lambda gold: spelling(gold) if re.fullmatch(pattern, gold, re.DOTALL) else gold


def _next_digit(match: re.Match[str]) -> str:
    return str((int(match[0]) + 1) % 10)


INTEGER, NUMBER = r"-?\d+", r"-?[\d.]+"
FORMULA = r"(?!.*(text|mbox|circ|matrix|pm|in |[=,%$_])).*"
SAME: dict[str, Spelling] = {
    r"\dfrac": _replaced(r"\\frac", r"\\dfrac"),
    "(a/b)": _replaced(r"(?<!\d)\\d?frac\{(\w+)\}\{(\w+)\}", r"(\1/\2)"),
    r"\[…\], line breaks": lambda gold: f"\\[\n{gold}\n\\]",
    r"\color": lambda gold: rf"\color{{blue}}{{{gold}}}",
    r"\left( … \right)": _replaced(r"(?<!t)([(\[])(.*)([)\]])$", r"\\left\1\2\\right\3"),
    "x = …": _where(FORMULA, lambda gold: f"x = {gold}"),
    "… cm": _where(NUMBER, lambda gold: rf"{gold} \text{{ cm}}"),
    "… ways": _where(NUMBER, lambda gold: f"{gold} ways"),
    "….0": _where(INTEGER, lambda gold: f"{gold}.0"),
    "…e0": _where(INTEGER, lambda gold: f"{gold}e0"),
    r"… \times 10^0": _where(INTEGER, lambda gold: rf"{gold} \times 10^{{0}}"),
    "… + 1 - 1": _where(FORMULA, lambda gold: f"{gold} + 1 - 1"),
    "bmatrix": _replaced("pmatrix", "bmatrix"),
    "without unit": _replaced(r"(?<=[\d}])\s*(\\(text|mbox)\{ ?[a-z]+\}(\^\d)?|\^\\circ)$", ""),
    "without base": _replaced(r"_\{?\d\}?$", ""),
}
OTHER: dict[str, Spelling] = {
    "other sign": _where(r"(?!0$)[\d\\].*", _where(FORMULA, lambda gold: f"-{gold}")),
    "first digit": _replaced(r"\d", _next_digit, count=1),
    "last digit": _replaced(r"\d(?=\D*$)", _next_digit),
    "other base": _replaced(r"_\{?(\d)\}?$", r"_{1\1}"),
    "last term dropped": _where(FORMULA, _replaced(r"\s*[+][^+(){}]*$", "")),
    "brackets": _where(r"\(.*\]|\[.*\)", _replaced(r"[)\]]$", lambda m: {")": "]", "]": ")"}[m[0]])),
    "> …": _where(NUMBER, lambda gold: f"> {gold}"),
    r"\neq …": _where(NUMBER, lambda gold: rf"\neq {gold}"),
    r"41 \implies …": lambda gold: rf"41 \implies {gold}",
    "3 = …": _where(r"(?!3$)\d+", lambda gold: f"3 = {gold}"),
    "lines 1, 2, …": _where(NUMBER, lambda gold: f"1\n2\n{gold}"),
    "… or 77": _where(r"(?!77$)\d+", lambda gold: rf"{gold} \text{{ or }} 77"),
    "… million": _where(r"[1-9]\d*", lambda gold: rf"{gold} \text{{ million}}"),
    "… t": _where(r"(?!0$)" + FORMULA, lambda gold: f"{gold} t"),
    "… 10^-9 too much": _where(INTEGER, lambda gold: rf"{gold} + 10^{{-9}}"),
}


def strings(response: str, gold: str) -> bool:
    from verl.utils.reward_score import math_reward

    box = math_reward.last_boxed_only_string(response)
    answer = math_reward.remove_boxed(box) if box else response
    if answer == gold:
        return True
    if len(answer) > 30:
        return False
    try:
        one, two = (math_reward.strip_string(text.replace(",", "")) for text in (answer, gold))
        return one == two or float(one) == float(two)
    except (AssertionError, ValueError, IndexError):
        return False


def main(
    golds: Annotated[Path, typer.Argument(exists=True, help="A Math test set: .json, .jsonl, .parquet or a folder.")],
    every: Annotated[int, typer.Option(min=1, help="Take each gold of so many.")] = 1,
    examples: Annotated[int, typer.Option(min=0, help="Golds to show for each cell that is off.")] = 0,
) -> None:
    """Print the table in Markdown."""
    from verl.utils.reward_score import math_verify

    from vlnorm_verl.tasks import math, sources

    print(line())
    pool = math.Pool(workers=2)
    rules: dict[str, Callable[[str, str], bool]] = {
        "ours": lambda response, gold: math.judge(response, math.parse_ground_truth(gold), pool) == "correct",
        "math_verify": lambda response, gold: math_verify.compute_score(response, gold) == 1,
        "strings": strings,
    }
    texts = [answer for _, answer in sources.parse_rows(sources.read_local(golds), math.read_row, str(golds))]
    texts = texts[::every]
    for title, spellings, correct in (
        ("correct, of", {"the gold": str} | SAME, True),
        ("correct though it is not, of", OTHER, False),
    ):
        print(f"\n| {title} | | {' | '.join(rules)} |\n|---|---|{'---|' * len(rules)}")
        for name, spelling in spellings.items():
            answers = [(gold, spelling(gold)) for gold in texts]
            answers = [pair for pair in answers if name == "the gold" or pair[0] != pair[1]]
            right, shown = Counter[str](), Counter[str]()
            for gold, answer in answers:
                for rule, judge in rules.items():
                    verdict = judge(rf"So it is $\boxed{{{answer}}}$.", gold)
                    right[rule] += verdict
                    if verdict != correct and shown[rule] < examples:
                        shown[rule] += 1
                        print(f"{rule}: {gold!r} {answer!r}")
            counts = " | ".join(str(right[rule]) for rule in rules)
            print(f"| `{name}` | {len(answers)} | {counts} |")
    pool.close()


if __name__ == "__main__":
    typer.run(main)
