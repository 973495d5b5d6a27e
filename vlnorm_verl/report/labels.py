"""What settings and methods are called on one page, and the colour and dash that each method has there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vlnorm_verl.methods import OTHER_COLORS, alpha_of, is_vl_norm, label_of, method_of, place_of
from vlnorm_verl.report import measures
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.table import number

TASKS = {"countdown": "CountDown", "math": "Math"}
FAMILIES = {"aggregation": "aggregation only", "dapo": "full DAPO"}
DASHES = {"-": "", "--": "7 3", "-.": "7 3 2 3", ":": "2 3"}
ALPHA_DASHES = ("4 2", "9 3", "2 2", "9 3 2 3")
TOO_DARK = 75  # of 255: such a colour is not seen on a dark page


class Look(NamedTuple):
    """color: "#RRGGBB" on white; dark: on a dark page; dash: SVG's stroke-dasharray, "" for a solid line.

    place: of the method on its page, which its class in HTML is named by: 3 is "m3".
    """

    place: int
    label: str
    color: str
    dark: str
    dash: str


def order(method_key: str) -> tuple[bool, int, str]:
    """VL Norm first, then as in the tables, then the others by name."""
    return not is_vl_norm(method_key), place_of(method_key), method_key


def looks(keys: Iterable[str]) -> dict[str, Look]:
    """One colour for each method of a page: its own, or where another has that one the next that is free."""
    found: dict[str, Look] = {}
    taken: set[str] = set()
    # VL Norm of the largest α has the hue of VL Norm; another α is told apart by a hue and a dash of its own.
    for key in sorted(set(keys), key=lambda key: (order(key)[:2], -(alpha_of(key) or 0.0), key)):
        method, first = method_of(key), not any(map(is_vl_norm, found))
        free = (color for color in (method.color, *OTHER_COLORS) if color not in taken)
        color = next(free, method.color)
        taken.add(color)
        line = method.line
        dash = DASHES.get(line, "") if isinstance(line, str) else " ".join(map(str, line[1]))
        if is_vl_norm(key) and not first:
            dash = ALPHA_DASHES[len(found) % len(ALPHA_DASHES)]
        found[key] = Look(0, label_of(key), color, _lighter(color), dash)
    return {key: found[key]._replace(place=place) for place, key in enumerate(sorted(found, key=order))}


def _lighter(color: str) -> str:
    red, green, blue = bytes.fromhex(color[1:])
    if 0.3 * red + 0.6 * green + 0.1 * blue >= TOO_DARK:
        return color
    return "#" + bytes(round(part + (225 - part) * 0.6) for part in (red, green, blue)).hex().upper()


def titles(settings: Iterable[Setting]) -> dict[Setting, str]:
    """{setting: its title}, with the family where two would be called the same."""
    settings = list(dict.fromkeys(settings))
    unknown = "all runs" if len(settings) == 1 else "setting not known"
    plain = []
    for _, task, model, length in settings:
        parts = TASKS.get(task, task), model.upper() if model[:1].isdigit() else model, length and f"{length} tokens"
        plain.append(", ".join(filter(None, parts)))
    return {
        setting: ", ".join(filter(None, (title, FAMILIES.get(setting.family, setting.family))))
        if plain.count(title) > 1
        else title or unknown
        for setting, title in zip(settings, plain, strict=True)
    }


def file_name(what: str, *parts: str) -> str:
    """A file stem: letters of any language, digits, ".", "_" and "-"."""
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (what, *parts)))).rstrip("-")


def accuracy_label(runs: Sequence[Run]) -> str:
    """Avg@8, or what the runs were validated with; several sets in one number are weighted."""
    name, (variables, _) = measures.accuracy_name(runs), measures.accuracies_of(runs)
    weighted = any(len(measures.validation_sets([run])) > 1 for run in runs)
    of = f" of {', '.join(sorted(variables))}" if variables - {"acc", name} else ""
    return ("weighted " if weighted else "") + name + of


def points(value: float, is_rate: bool, sign: bool = True) -> str:
    """A difference: of rates in points, "+4.6"; of another metric as it is, "−0.012"."""
    return number(100 * value, 1, sign) if is_rate else number(value, 3, sign)
