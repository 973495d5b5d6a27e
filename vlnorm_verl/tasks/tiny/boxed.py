"""The tiny CountDown in the Math task's clothes, for recipes with task=math and model=tiny.

A model of 0.3 M parameters cannot write LaTeX. So the prompts are the tiny CountDown's, the answer `A:7+3-12` that the
model ends with is rewritten as `\\boxed{(7+3)-12}`, and the real Math reward (vlnorm_verl.tasks.math, with its worker
processes) compares that with the target. Files and columns are those of `vlnorm-verl data math`.

Covered: the data path, the validation sets and the reward of the Math recipes, with outcomes that differ.
Not covered: anything about learning Math. Which numbers an answer uses is not looked at.
"""

from __future__ import annotations

import re
from typing import Any

from vlnorm_verl.tasks.math import compute_score as math_score

_ANSWER = re.compile(r"A:([0-9]{1,2}[-+*][0-9]{1,2})([-+*][0-9]{1,2})\.?$", re.ASCII)


def boxed(response: str) -> str:
    """The response with its final answer as Math's prompts ask for it; without one, unchanged."""
    # Left to right is how the tiny task reads an expression, hence the parentheses.
    return _ANSWER.sub(r"\\boxed{(\1)\2}", response)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """`vlnorm_verl.tasks.math.compute_score` of the rewritten response."""
    return math_score(data_source, boxed(solution_str), ground_truth, extra_info, **kwargs)
