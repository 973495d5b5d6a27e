"""`vlnorm-verl data --offline`: the generated problems, worked out another way."""

from __future__ import annotations

import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.data_command import (
    MATH_FILES,
    SMALL_COUNTDOWN,
    SMALL_MATH,
    data,
    manifest_of,
    must_run,
    rows_of,
    visible,
)
from vlnorm_verl.tasks import countdown as countdown_task
from vlnorm_verl.tasks import generate, sources


def test_every_generated_countdown_is_solved_by_its_solution(tmp_path: Path) -> None:
    must_run("countdown", "--offline", "--train-rows", 1500, "--test-rows", 300, "--out", tmp_path)
    keys: dict[str, set[Any]] = {}
    for split, count in (("train", 1500), ("test", 300)):
        rows = rows_of(tmp_path / f"{split}.parquet")
        keys[split] = set()
        for row in rows:
            problem = countdown_task.parse_ground_truth(row["reward_model"]["ground_truth"])
            answer = f"<answer>{row['extra_info']['solution']}</answer>"
            assert countdown_task.judge(answer, problem) == "correct"
            assert len(problem.numbers) in (3, 4)
            assert set(problem.numbers) <= set(range(1, 100))
            assert 10 <= problem.target <= 100
            assert row["prompt"][0]["content"] == countdown_task.prompt(problem)
            assert row["extra_info"]["origin"] == "generated"
            keys[split].add((tuple(sorted(problem.numbers)), problem.target))
        assert len(keys[split]) == len(rows) == count
    assert not keys["train"] & keys["test"]
    solutions = "".join(row["extra_info"]["solution"] for row in rows)
    assert all(op in solutions for op in "+-*/(")


def test_no_seed_or_size_trains_on_a_held_out_problem() -> None:
    def keys(split: str, seed: int) -> set[Any]:
        return {(tuple(sorted(p.numbers)), p.target) for p, _ in generate.countdown(split, 250, seed)}

    trained = keys("train", 0) | keys("train", 1)
    assert not trained & (keys("test", 0) | keys("test", 7))


def test_generated_sets_are_the_same_everywhere(tmp_path: Path) -> None:
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path / "a")
    must_run(*SMALL_COUNTDOWN, "--seed", 0, "--out", tmp_path / "b")
    must_run(*SMALL_COUNTDOWN, "--seed", 1, "--out", tmp_path / "c")
    a, b, c = (manifest_of(tmp_path / name)["files"]["train.parquet"] for name in "abc")
    assert a == b
    assert a["sha256"] != c["sha256"]
    must_run(*SMALL_MATH, "--out", tmp_path / "m")
    # Recorded once, of the rows, since each pyarrow writes another file: another value means that users' data would
    # change under the same command.
    for name, recorded in (
        ("a", "3ad051ad7037c49f82756e17ea37a007f5cb5fcdb5c5811dea3fc13851f49146"),
        ("m", "27a5969f4e89fdf435ad4fce4111813ba011a859ebd207679d01659280a6624f"),
    ):
        rows = rows_of(tmp_path / name / "train.parquet")
        lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows]
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == recorded


def test_more_problems_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_NUMBER", 3)
    code, output = data(*SMALL_COUNTDOWN, "--train-rows", 5000, "--out", tmp_path)
    assert code == 2
    assert "there are fewer than 5000 different problems" in output
    assert "lower --train-rows" in output
    assert visible(tmp_path) == []


def solve(question: str) -> Fraction:
    """The answer of a generated Math question, worked out another way than the generator does."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if m := re.fullmatch(r"Compute \$(\d+) \\cdot (\d+) ([+-] \d+)\$\.", question):
        return Fraction(int(m[1]) * int(m[2]) + int(m[3].replace(" ", "")))
    if m := re.fullmatch(r"Solve \$(\d+)x ([+-] \d+) = (-?\d+)\$ for \$x\$\.", question):
        x = Fraction(int(m[3]) - int(m[2].replace(" ", "")), int(m[1]))
        assert int(m[1]) * x + int(m[2].replace(" ", "")) == int(m[3])
        return x
    if question.startswith("Write"):
        a, b, c, d = numbers
        return Fraction(a * d + c * b, b * d)
    if question.startswith("Find the remainder"):
        base, exponent, modulus = numbers
        return Fraction(base**exponent % modulus)
    if question.startswith("An arithmetic sequence"):
        first, step, terms = numbers
        return Fraction(sum(first + step * i for i in range(terms)))
    m = re.search(r"x\^2 - (\d+)x ([+-] \d+) = 0", question)
    assert m
    p, q = int(m[1]), int(m[2].replace(" ", ""))
    root = complex(p * p - 4 * q) ** 0.5
    squares = ((p + root) / 2) ** 2 + ((p - root) / 2) ** 2
    assert abs(squares - round(squares.real)) < 1e-6
    return Fraction(round(squares.real))


def test_every_generated_math_answer_is_right(tmp_path: Path) -> None:
    must_run("math", "--offline", "--train-rows", 400, "--test-rows", 60, "--out", tmp_path)
    questions: list[str] = []
    kinds: set[str] = set()
    for name in MATH_FILES:
        rows = rows_of(tmp_path / name)
        assert len(rows) == (400 if name == "train.parquet" else 60)
        for row in rows:
            question = row["prompt"][0]["content"].split("tag.\n")[1].removesuffix("\nAssistant: <think>")
            answer = row["reward_model"]["ground_truth"]
            fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
            value = Fraction(int(fraction[1] + fraction[2]), int(fraction[3])) if fraction else Fraction(answer)
            assert value == solve(question), question
            assert fraction is None or (value.numerator, value.denominator) == (
                int(fraction[1] + fraction[2]),
                int(fraction[3]),
            )
            if name == "aime2024.parquet":
                assert re.fullmatch(r"\d{1,3}", answer)
            if name == "amc.parquet":
                assert answer.endswith(".0")
            questions.append(question)
            kinds.add(question.split()[0])
            assert row["extra_info"]["origin"] == "generated"
            assert row["data_source"] == sources.data_source(name.removesuffix(".parquet"))
    assert kinds == {"Compute", "Solve", "Write", "Find", "An", "Let"}
    assert len(set(questions)) == len(questions)
