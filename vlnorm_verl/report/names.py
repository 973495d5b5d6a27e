"""What names of files and folders say of a run: its method, its seed, and what tells it from others.

In names, nearest first: a loss_agg_mode (vl_norm, vl_norm:0.75, exp-token-mean, dapo_norm_s0 …) is the method, s0 or
seed0 the seed; names that every run has (metrics, wandb, a date) say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlnorm_verl.methods import METHODS, MODES

# Not DAPO and Dr. GRPO, whose names are also those of families and of aggregations.
NAMED = (*MODES, *(name for name in METHODS if name.endswith("_as_coded")))

# A mode between separators, "-", "_" and " " alike, longest first; of VL Norm with α as in vl_norm:0.75,
# vl_norm-alpha0.75, vl_norm-0.75.
_MODE = re.compile(
    "(?<![a-z0-9])(?P<mode>"
    + "|".join(re.sub("[-_]", "[-_ ]", mode) for mode in sorted(NAMED, key=len, reverse=True))
    + r")(?![a-z0-9])"
    + r"(?::(?P<parameter>(?:,(?![a-z])|[^\s_/,-])*)"
    + r"|(?:[-_ ]?(?:alpha|α)[-_= ]*(?P<alpha>\d(\.\d+)?)|[-_ ](?P<decimal>\d\.\d+))"
    + r"(?![a-z0-9.]))?",  # 1.5b is a model
    re.IGNORECASE,
)
_SEED = re.compile(r"(?:^|[-_., ])(?:seed[-_=]?(\d{1,9})(?=$|[-_., ])|s(\d{1,9})$)", re.IGNORECASE)
# Names that tell no run from another: what loggers and their users call any log, dates, wandb's folders.
SAYS_NOTHING = re.compile(
    r"(metrics|logs?|train(ing)?|output|outputs|events|wandb|tensorboard(_log)?|tb(_logs?)?|files|latest-run"
    r"|(offline-)?run-\d{8}_\d{6}-\w+|[\d_:T.-]*)",
    re.IGNORECASE,
)


def read_names(names: Sequence[str], below: int, common: frozenset[str]) -> tuple[str, int | None, tuple[str, ...]]:
    """(mode or "", seed, what else they say) of names, nearest first.

    Of the argument's own name and those above it, which may be anything (a home, a project), one that all runs have in
    common counts only if nothing nearer says what the run is, or if a mode or a seed is all of the name.
    """
    method, seed = "", None
    rest: list[str] = []
    for index, name in enumerate(names):
        said = bool(method or rest)
        left, own_seed = _cut_seed(name)
        left, mode = _cut_mode(left)
        if index >= below and name in common and said and left:
            mode, own_seed, left = "", None, name
        method = method or mode
        seed = own_seed if seed is None else seed
        if not SAYS_NOTHING.fullmatch(left):
            rest.append(left)
    return method, seed, tuple(rest)


def _cut_seed(name: str) -> tuple[str, int | None]:
    match = _SEED.search(name)
    return (name[: match.start()] + name[match.end() :], int(match[1] or match[2])) if match else (name, None)


def _cut_mode(name: str) -> tuple[str, str]:
    """The name without its mode, and that; two modes in one name are a comparison's."""
    matches = list(_MODE.finditer(name))
    if len(matches) != 1:
        return name, ""
    (match,) = matches
    plain = re.sub("[- ]", "_", match["mode"].lower())
    mode = next(mode for mode in NAMED if mode.replace("-", "_") == plain)
    for parameter in (match[group] for group in ("parameter", "alpha", "decimal") if match[group] is not None):
        mode += f":{parameter}"
    return (name[: match.start()].rstrip("-_., ") + name[match.end() :]).strip("-_., "), mode


def shortest(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each path, nearest part first, as many parts as tell it from the other paths: "exp", "project/exp"."""
    shortened = []
    for path in names:
        others = [other for other in set(names) if other != path]
        parts = next((k for k in range(1, len(path)) if all(other[:k] != path[:k] for other in others)), len(path))
        shortened.append("/".join(reversed(path[:parts])))
    return shortened
