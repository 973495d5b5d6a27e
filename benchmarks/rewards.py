r"""Answers per second of the rewards, and hostile responses.

    python benchmarks/rewards.py [--answers 1000] [--rounds 5] [--hostile 10000] [--limit-s 0.5]

CountDown against the paper's rule (regular expressions and `eval`); Math with one worker and with one per CPU against
math-verify called in this process. The sides take turns, round after round, and the medians are shown. Each round has
answers and golds of its own, and one round before the first is not counted: a gold is never read from a cache. Hostile
responses are tests/hostile.py's: the longest time of one includes the start of a worker, where the one before had to be
killed, and the kill.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from origin import line
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import hostile
from tests.test_rewards_countdown import papers_rule
from vlnorm_verl.tasks import countdown
from vlnorm_verl.tasks import math as math_reward

console = Console()


def countdown_answers(count: int, seed: int) -> list[tuple[str, countdown.Problem]]:
    """Responses of about 2,000 characters, half of them correct."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        a, b, c, d = (rng.randint(1, 99) for _ in range(4))
        problem = countdown.Problem((d, c, b, a), (a + b) * c - d + rng.randint(0, 1))
        thought = "Try 3 * 7 - 12 = 9, too small.\n" * 60
        cases.append((f"{thought}<answer> ({a} + {b}) * {c} - {d} </answer>", problem))
    return cases


def math_answers(count: int, seed: int) -> list[tuple[str, str]]:
    """(gold, answer) in other words; three of four are equal."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        n, m = rng.randint(2, 999), rng.randint(2, 99)
        gold, answer = (
            (rf"\frac{{{n}}}{{{m}}}", f"{n}/{m}"),
            (f"{1000 + n}", f"{1 + n // 1000},{n % 1000:03d}"),
            (rf"{m}\sqrt{{{n}}}", rf"\sqrt{{{m * m * n}}}"),
            (rf"({n},{m})", rf"\left({n}, {m}\right)"),
            (f"x^2+{2 * m}x+{m * m}", f"(x+{m})^2"),
            (rf"\{{{n},{m}\}}", rf"{m}, {n}"),
        )[i % 6]
        cases.append((gold, answer if rng.random() < 0.75 else f"{answer}+1"))
    return cases


def race(
    title: str,
    make: Callable[[int, int], list[Any]],
    count: int,
    rounds: int,
    sides: dict[str, Callable[[list[Any]], list[bool]]],
) -> None:
    """Run the sides in turn on what `make(count, seed)` gives; the first is what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    correct = dict.fromkeys(sides, 0)
    for turn in range(rounds + 1):
        cases = make(count, turn)
        for name, side in sides.items():
            start = time.perf_counter()
            verdicts = side(cases)
            if turn:  # the first starts the workers
                seconds[name].append(time.perf_counter() - start)
                correct[name] += sum(verdicts)
    first = next(iter(sides))
    table = Table("", "answers / s", "ratio", "least ... most", "correct", title=title)
    for name in sides:
        rates = sorted(count / s for s in seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        spread = f"{rates[0]:,.0f} ... {rates[-1]:,.0f}"
        table.add_row(
            name, f"{statistics.median(rates):,.0f}", f"{ratio:.2f}", spread, f"{correct[name]} of {rounds * count}"
        )
    console.print(table)


def hostile_run(title: str, responses: list[str], threads: int, judge: Callable[[str], str]) -> None:
    def timed(response: str) -> tuple[str, float]:
        start = time.perf_counter()
        outcome = judge(response)
        return outcome, time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as executor:
        results = list(executor.map(timed, responses))
    total = time.perf_counter() - start
    table = Table("outcome", "responses", title=f"{title}: {len(results):,} hostile responses in {total:,.1f} s")
    for outcome, number in Counter(outcome for outcome, _ in results).most_common():
        table.add_row(outcome, f"{number:,}")
    table.add_section()
    table.add_row("longest time of one", f"{max(s for _, s in results):.3f} s")
    console.print(table)


def main(
    answers: Annotated[int, typer.Option(min=1, help="Responses of each kind to score.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the median is printed.")] = 5,
    hostile_responses: Annotated[int, typer.Option("--hostile", help="0: none.")] = 10_000,
    limit_s: Annotated[float, typer.Option(help="Of one hostile Math answer, in seconds.")] = 0.5,
) -> None:
    """Print the tables."""
    from math_verify import parse, verify

    console.print(line(), markup=False)
    cpus = len(os.sched_getaffinity(0))
    race(
        "CountDown",
        countdown_answers,
        answers,
        rounds,
        {
            "paper's rule (eval)": lambda cases: [papers_rule(response, problem) for response, problem in cases],
            "ours": lambda cases: [countdown.judge(response, problem) == "correct" for response, problem in cases],
        },
    )

    one, many = math_reward.Pool(workers=1), math_reward.Pool(workers=cpus)

    def in_threads(pairs: list[tuple[str, str]], pool: math_reward.Pool, threads: int) -> list[bool]:
        with ThreadPoolExecutor(threads) as executor:
            return list(executor.map(lambda pair: pool.compare(*pair) == "correct", pairs))

    race(
        "Math",
        math_answers,
        answers,
        rounds,
        {
            "math-verify in this process": lambda pairs: [
                verify(parse(f"${gold}$"), parse(f"${answer}$")) for gold, answer in pairs
            ],
            "ours, 1 worker": lambda pairs: in_threads(pairs, one, 1),
            f"ours, {cpus} workers": lambda pairs: in_threads(pairs, many, cpus),
        },
    )
    one.close()
    many.close()

    if hostile_responses:
        texts = list(hostile.responses(hostile_responses, 0, "<answer>", "</answer>", hostile.ARITHMETIC))
        problem = countdown.Problem((1,), 1)
        hostile_run("CountDown", texts, 1, lambda response: countdown.judge(response, problem))
        texts = list(hostile.responses(hostile_responses, 0, r"\boxed{", "}", hostile.MATHS))
        pool = math_reward.Pool(limit_s=limit_s, workers=cpus, max_failure_rate=1)
        title = f"Math, limit {limit_s:g} s, {cpus} workers"
        hostile_run(title, texts, cpus, lambda response: math_reward.judge(response, "7", pool))
        pool.close()


if __name__ == "__main__":
    typer.run(main)
