"""`vlnorm-verl data` from local files: row counts, and each source's format by small files (data_samples/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from tests.data_command import (
    COUNTDOWN_PROMPT,
    MATH_FILES,
    MATH_PROMPT,
    SAMPLES,
    data,
    manifest_of,
    must_run,
    rows_of,
    visible,
)
from vlnorm_verl.tasks import countdown as countdown_task
from vlnorm_verl.tasks import math as math_task


def test_every_math_source_is_read_in_its_own_format(tmp_path: Path) -> None:
    must_run("math", "--from", SAMPLES, "--allow-any-rows", "--out", tmp_path)
    assert visible(tmp_path) == sorted([*MATH_FILES, "manifest.json"])
    answers = {name: [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / name)] for name in MATH_FILES}
    assert answers == {
        "train.parquet": ["1000", "\\frac{3}{4}", "8"],
        "math500.parquet": ["\\left( 3, \\frac{\\pi}{2} \\right)", "p - q", "\\frac{14}{3}", "42"],
        "aime2024.parquet": ["73", "236", "45"],
        "amc.parquet": ["7.0", "142.0"],  # the source's floats, as the authors' str() writes them
        "minerva.parquet": ["620", "0.01", "7 \\times 10^{8}"],  # the first of several, without its line end
    }
    assert rows_of(tmp_path / "train.parquet")[2] == {
        "data_source": "open_reasoner_zero",
        "prompt": [
            {
                "role": "user",
                "content": MATH_PROMPT.replace(
                    "What is $1+1$?", "Let $S=\\{1,2,3\\}$. How many subsets has $S$? {question}"
                ),
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "8"},
        "extra_info": {"split": "train", "index": 2, "origin": "file", "solution": ""},
    }
    for name in MATH_FILES[1:]:
        for index, row in enumerate(rows_of(tmp_path / name)):
            assert row["data_source"] == name.removesuffix(".parquet")
            assert row["extra_info"] == {"split": "test", "index": index, "origin": "file", "solution": ""}
    assert manifest_of(tmp_path)["sources"]["amc"]["path"] == str(SAMPLES / "amc")


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # columns of the Hugging Face sets of the table
        ({"problem": "Q", "solution": "long", "answer": "5", "subject": "A", "level": 2, "unique_id": "u"}, ("Q", "5")),
        ({"id": 60, "problem": "Q", "solution": "long", "answer": "204", "url": "", "year": "2024"}, ("Q", "204")),
        ({"id": 0, "problem": "Q", "answer": 142.0, "url": ""}, ("Q", "142.0")),
        ({"question": "Q", "answer": "9.6\n"}, ("Q", "9.6")),
        ({"question": "Q", "answer": 0}, ("Q", "0")),
        ({"question": "Q", "answer": 10**400}, ("Q", "1" + "0" * 400)),  # above the largest float
    ],
)
def test_hub_columns(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert math_task.read_row(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "Q"},
        {"answer": "5"},
        {"problem": "Q", "answer": None},
        {"problem": "Q", "answer": []},
        {"problem": "Q", "answer": " \n"},
        {"problem": "Q", "answer": True},
        {"problem": "Q", "answer": float("nan")},
        {"problem": "Q", "answer": float("-inf")},
        {"problem": "", "answer": "5"},
        {"problem": 3, "answer": "5"},
        {"prompt": [{"value": "a"}, {"value": "b"}], "final_answer": "5"},
        [{"value": "Q"}],
        [{"value": "Q"}, {"ground_truth": "5"}],
        "text",
        None,
    ],
)
def test_a_row_of_no_known_format_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match=r"question|answer"):
        math_task.read_row(row)


@pytest.mark.parametrize(
    "row",
    [
        {"nums": [1, 2]},
        {"target": 3},
        {"nums": [1, 2.5], "target": 3},
        {"nums": [], "target": 3},
        {"nums": 1, "target": 3},
        {"nums": [1, 2], "target": float("inf")},
        {"nums": [-1, 2], "target": 1},  # no answer could use -1
        [],
    ],
)
def test_a_countdown_row_of_no_known_format_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match="nums"):
        countdown_task.read_row(row)


def test_countdown_takes_the_first_rows_to_train_and_the_next_to_test(tmp_path: Path) -> None:
    must_run(
        "countdown", "--from", SAMPLES / "countdown.parquet", "--train-rows", 3, "--test-rows", 2, "--out", tmp_path
    )
    train, test = rows_of(tmp_path / "train.parquet"), rows_of(tmp_path / "test.parquet")
    assert train[0] == {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": COUNTDOWN_PROMPT}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": '{"numbers": [44, 19, 35], "target": 98}'},
        "extra_info": {"split": "train", "index": 0, "origin": "file", "solution": ""},
    }
    truths = [json.loads(row["reward_model"]["ground_truth"])["target"] for row in train + test]
    assert truths == [98, 64, 28, 48, 15]
    assert [row["extra_info"]["index"] for row in test] == [0, 1]


@pytest.mark.parametrize("ending", [".jsonl", ".json", "folder"])
def test_countdown_from_other_kinds_of_files(tmp_path: Path, ending: str) -> None:
    raw = pq.read_table(SAMPLES / "countdown.parquet").to_pylist()
    path = tmp_path / f"copy{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in raw))
    elif ending == ".json":
        path.write_text(json.dumps(raw))
    else:
        datasets.Dataset.from_list(raw).save_to_disk(str(path))
    sizes = ["--train-rows", 3, "--test-rows", 2]
    must_run("countdown", "--from", path, *sizes, "--out", tmp_path / "a")
    must_run("countdown", "--from", SAMPLES / "countdown.parquet", *sizes, "--out", tmp_path / "b")
    for name in ("train.parquet", "test.parquet"):
        assert rows_of(tmp_path / "a" / name) == rows_of(tmp_path / "b" / name)


def test_too_few_countdown_rows_name_the_options(tmp_path: Path) -> None:
    code, output = data("countdown", "--from", SAMPLES / "countdown.parquet", "--out", tmp_path)
    assert code == 2
    assert "6 rows" in output
    assert "--train-rows 32768" in output
    assert "--test-rows 1024" in output
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a.json holds a dict, not a list of rows"),
        ("a.json", "[1,", "cannot read"),
        ("a.jsonl", '{"target": 3}\n\n{"target": 3}', "row 0: columns nums"),
        ("a.parquet", "no parquet", "cannot read"),
        ("a.csv", "target,nums", "unknown ending '.csv'; accepted: .json"),
        ("a.json", '[{"nums": [1, 2], "target": 3}, []]', "row 1: columns nums"),
    ],
)
def test_an_unreadable_local_file_is_one_message(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    code, output = data(
        "countdown", "--from", tmp_path / name, "--train-rows", 1, "--test-rows", 1, "--out", tmp_path / "o"
    )
    assert code == 2
    assert message in output
    assert visible(tmp_path / "o") == []


def test_a_missing_local_file_is_one_message(tmp_path: Path) -> None:
    code, output = data("countdown", "--from", tmp_path / "gone.parquet", "--out", tmp_path / "o")
    assert (code, output.startswith("cannot read")) == (2, True)
    (tmp_path / "empty").mkdir()
    code, output = data("math", "--from", tmp_path / "empty", "--out", tmp_path / "o")
    assert code == 2
    assert "looked for train.json, train.jsonl, train.parquet, train, orz_math_57k_collected.json" in output


# --- counts --------------------------------------------------------------------------------------------------


def test_other_row_counts_need_leave(tmp_path: Path) -> None:
    code, output = data("math", "--from", SAMPLES, "--out", tmp_path)
    assert code == 2
    assert "has 3 rows, the paper's set has 56000 to 58000: --allow-any-rows accepts it" in output
    assert visible(tmp_path) == []
    code, output = data("math", "--allow-any-rows", "--out", tmp_path)
    assert code == 2
    assert "only together with --from or --file" in output
