"""What methods are called and how they are drawn: one reading of name:α, labels, colours that can be told apart."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
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
PAIRS = [pair for family in FAMILIES for pair in itertools.combinations(family, 2)]
# Viénot, Brettel & Mollon 1999: linear RGB as a deuteranope sees it.
DEUTERANOPIA = np.array([[0.29275, 0.70725, -0.02234], [0.29275, 0.70725, -0.02234], [-0.02234, 0.02234, 1.0]])


def linear(color: str) -> np.ndarray:
    """Linear RGB of "#RRGGBB"."""
    rgb = np.array([*bytes.fromhex(color[1:])]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(color: str, vision: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a color as seen through `vision`, a matrix of linear RGB."""
    seen = np.clip(vision @ linear(color), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ seen / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_methods_differ_in_color_for_a_deuteranope_and_without_color(one: str, other: str) -> None:
    for vision in (np.eye(3), DEUTERANOPIA):
        distance = np.linalg.norm(lab(method_of(one).color, vision) - lab(method_of(other).color, vision))
        assert distance > 12, distance  # 2.3 is just noticeable
    assert method_of(one).line != method_of(other).line
    assert method_of(one).marker != method_of(other).marker


def test_shades_of_alpha_get_darker_around_the_methods_own() -> None:
    lightness = [lab(alpha_color(alpha), np.eye(3))[0] for alpha in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)]
    assert all(a - b > 4 for a, b in itertools.pairwise(lightness))
    assert alpha_color(1) == method_of("vl_norm").color
