"""What methods are called and how they are drawn: one reading of name:α, labels, looks that can be told apart."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from vlnorm_verl import available, methods
from vlnorm_verl.methods import alpha_color, label_of, method_of, split


@pytest.mark.parametrize(
    ("key", "name", "alpha"),
    [
        ("vl_norm", "vl_norm", None),
        ("vl_norm:0.750", "vl_norm", 0.75),
        ("token-mean", "dapo_norm", None),
        ("seq-mean-token-sum-norm", "dr_grpo_norm", None),
        ("vl_norm:x", "vl_norm:x", None),
        ("mine:2", "mine:2", None),
    ],
)
def test_a_key_is_a_name_and_an_alpha(key: str, name: str, alpha: float | None) -> None:
    assert split(key) == (name, alpha)
    if alpha is not None:
        assert methods.join(name, alpha) == "vl_norm:0.75"


def test_every_mode_of_the_package_is_a_method() -> None:
    assert {row.name for row in methods.METHODS.values() if row.is_mode} == set(available())


def test_methods_need_neither_torch_nor_verl() -> None:
    code = "import sys, vlnorm_verl.methods; sys.exit(bool({'torch', 'verl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_labels_are_the_papers() -> None:
    assert label_of("vl_norm:1") == "VL Norm (α = 1)"
    assert label_of("vl_norm:0.75", "dapo") == "DAPO + VL Norm (α = 0.75)"
    assert label_of("vl_norm", "dapo") == "DAPO + VL Norm"
    assert [label_of(mode) for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")] == [
        "DAPO Norm",
        "GRPO Norm",
        "Dr. GRPO Norm",
    ]
    assert [label_of(method, "dapo") for method in ("dapo", "overlong_filtering", "soft_punishment")] == [
        "DAPO",
        "DAPO + overlong filtering",
        "DAPO + soft punishment",
    ]
    assert [label_of(key) for key in ("dr_grpo", "mine:2", "vl_norm:x")] == [
        "Dr. GRPO",
        "mine:2",
        "vl_norm:x",
    ]


def test_a_method_has_one_color() -> None:
    assert len({method_of(key).color for key in ("vl_norm", "vl_norm:1", "vl_norm:0.75", "vl_norm:0")}) == 1
    assert method_of("token-mean").color == method_of("dapo_norm").color
    # Not by Python's hash of a string, which differs from process to process.
    assert method_of("mine").color == "#888888"


def test_other_methods_look_like_none_of_the_rows() -> None:
    for looks, others in (
        ({row.color for row in methods.METHODS.values()}, methods.OTHER_COLORS),
        ({row.line for row in methods.METHODS.values()}, methods.OTHER_LINES),
        ({row.marker for row in methods.METHODS.values()}, methods.OTHER_MARKERS),
    ):
        assert looks.isdisjoint(others)


FAMILIES = (
    ("vl_norm", "grpo_norm", "dapo_norm", "dr_grpo_norm", "dr_grpo"),
    ("vl_norm", "dapo", "overlong_filtering", "soft_punishment"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_differ_in_color_and_without_color(family: tuple[str, ...]) -> None:
    for look in ("color", "line", "marker"):
        assert len({getattr(method_of(name), look) for name in family}) == len(family)


def test_shades_of_alpha_get_darker_around_the_methods_own() -> None:
    shades = [sum(bytes.fromhex(alpha_color(alpha)[1:])) for alpha in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)]
    assert all(light > dark for light, dark in itertools.pairwise(shades))
    assert alpha_color(1) == method_of("vl_norm").color
