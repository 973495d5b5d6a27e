"""The methods that are compared: one row each, with what it is called, how it is drawn and what its entropy is.

A method's key is its name, of VL Norm with its α: "dapo_norm", "vl_norm:0.75". Colours are Okabe & Ito's (2008), which
differ under the common colour-vision deficiencies too, as do those of the two "as coded"; line style and marker tell
the methods apart without colour.

Covered: names and looks. Not covered: the aggregations themselves (aggregation.py) and what is accepted as a
loss_agg_mode (`vlnorm_verl.parse_mode`). Nothing here needs torch or verl.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

LineStyle = str | tuple[int, tuple[int, ...]]  # as matplotlib takes it


class Method(NamedTuple):
    """A method as the recipes know it.

    label: as the paper writes it. color, line, marker: as matplotlib takes them.
    entropy: what verl's `actor/entropy`, aggregated as the loss is, comes to under its weights: "mean over tokens" (of
    all tokens, or of each response's mean), "sum over M" (the mean over responses of their sum, over M), or "" where
    only the logged weights tell.
    verl: verl's own loss_agg_mode of this aggregation. is_mode: whether the name is a loss_agg_mode of this package.
    """

    name: str
    label: str
    color: str
    line: LineStyle
    marker: str
    entropy: str = ""
    verl: str = ""
    is_mode: bool = False


PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe & Ito's but yellow
BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, VERMILION = PALETTE
BLACK = "#000000"
MEAN_OVER_TOKENS, SUM_OVER_M = "mean over tokens", "sum over M"
# In the order of the tables. DAPO's aggregation is DAPO Norm's, and no figure has both: they share a colour.
METHODS = {
    row.name: row
    for row in (
        Method("grpo_norm", "GRPO Norm", BLUE, "--", "s", MEAN_OVER_TOKENS, "seq-mean-token-mean", True),
        Method("dapo_norm", "DAPO Norm", GREEN, "-.", "^", MEAN_OVER_TOKENS, "token-mean", True),
        Method("dr_grpo_norm", "Dr. GRPO Norm", PURPLE, ":", "D", SUM_OVER_M, "seq-mean-token-sum-norm", True),
        Method("dr_grpo", "Dr. GRPO", SKY_BLUE, (0, (3, 1, 1, 1, 1, 1)), "v", SUM_OVER_M),
        Method("dapo", "DAPO", GREEN, "-.", "^", MEAN_OVER_TOKENS),
        Method("overlong_filtering", "DAPO + overlong filtering", BLACK, "--", "s", MEAN_OVER_TOKENS),
        Method("soft_punishment", "DAPO + soft punishment", ORANGE, ":", "D", MEAN_OVER_TOKENS),
        Method("dapo_norm_as_coded", "DAPO Norm, as coded", "#6A6A35", (0, (5, 1)), "P", MEAN_OVER_TOKENS),
        Method("vl_norm_as_coded", "VL Norm, as coded", "#882255", (0, (8, 2)), "X", SUM_OVER_M),
        Method("vl_norm", "VL Norm", VERMILION, "-", "o", is_mode=True),
    )
}
OF_VERL = {row.verl: row.name for row in METHODS.values() if row.verl}
# Every loss_agg_mode that a name of a file or folder may have in it.
MODES = (*(row.name for row in METHODS.values() if row.is_mode), *OF_VERL, "seq-mean-token-sum")

# For methods that are not above: Paul Tol's muted scheme without what resembles those colours.
OTHER_COLORS = ("#332288", "#44AA99", "#AA4499", "#661100", "#888888")
OTHER_LINES = ((0, (1, 1)), (0, (5, 2, 1, 2)))
OTHER_MARKERS = ("<", ">", "p", "h", "*")


def split(key: str) -> tuple[str, float | None]:
    """(name, α) of a method's key, a loss_agg_mode or a label; verl's modes by the paper's names.

    α is None where none is written, and for every other method. What cannot be read is a name as a whole: "vl_norm:x".
    """
    name, _, number = key.partition(":")
    if name not in ("vl_norm", "vl_norm_as_coded"):
        return OF_VERL.get(key, key), None
    try:
        return name, float(number) if number else None
    except ValueError:
        return key, None


def join(name: str, alpha: float | None) -> str:
    """The key of a method: ("vl_norm", 0.75) -> "vl_norm:0.75"."""
    return name if alpha is None else f"{name}:{alpha:g}"


def alpha_of(key: str) -> float | None:
    return split(key)[1]


def is_vl_norm(key: str) -> bool:
    return split(key)[0] == "vl_norm"


def method_of(key: str) -> Method:
    """The row of a method, whatever its α; of an unknown one a row of its own, the same in every process."""
    name = split(key)[0]
    if name in METHODS:
        return METHODS[name]

    def pick(choices: tuple[Any, ...], salt: str) -> Any:
        return choices[zlib.crc32(f"{salt}{name}".encode()) % len(choices)]

    return Method(name, name, pick(OTHER_COLORS, "color"), pick(OTHER_LINES, "line"), pick(OTHER_MARKERS, "marker"))


def label_of(key: str, family: str = "") -> str:
    """The method as the paper writes it: "VL Norm (α = 1)", in the family "dapo" "DAPO + VL Norm (α = 1)"."""
    label, alpha = method_of(key).label, alpha_of(key)
    in_dapo = "DAPO + " if family == "dapo" and is_vl_norm(key) else ""
    return f"{in_dapo}{label}{'' if alpha is None else f' (α = {alpha:g})'}"


def place_of(key: str) -> int:
    """Where the method stands among the others; unknown ones are last."""
    names = list(METHODS)
    name = split(key)[0]
    return names.index(name) if name in METHODS else len(names)


def alpha_color(alpha: float) -> str:
    """A shade of VL Norm's hue for comparisons over α: α = 0 light, 1 VL Norm's own, 2 dark."""
    own = bytes.fromhex(METHODS["vl_norm"].color[1:])
    end, share = (250, min(1 - alpha, 1) * 0.62) if alpha <= 1 else (0, min(alpha - 1, 1) * 0.65)
    return "#" + bytes(round(part + (end - part) * share) for part in own).hex().upper()


def color_of(key: str) -> str:
    """Of a method in a comparison over α: VL Norm's by shades."""
    alpha = alpha_of(key)
    return method_of(key).color if alpha is None else alpha_color(alpha)
