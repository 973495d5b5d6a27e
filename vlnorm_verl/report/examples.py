"""Responses to look at: of each method, some right and some wrong ones of its last validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from vlnorm_verl.report.dumps import is_later_output, scored
from vlnorm_verl.report.measures import final_step
from vlnorm_verl.report.run import Run
from vlnorm_verl.runs.records import read_lines

EACH = 5  # right ones, and wrong ones
LONGEST = 1200  # characters of a prompt and of a response; the middle of a longer one is left out


class Example(NamedTuple):
    """One response; all of it is text that a model or a data set wrote."""

    right: bool
    prompt: str
    response: str
    truth: str


class _Texts(msgspec.Struct):
    """The fields of a dump's line that are shown."""

    input: Any = ""
    output: Any = ""
    gts: Any = None
    score: Any = None
    acc: Any = None
    uid: Any = None


_TEXTS = msgspec.json.Decoder(_Texts)


def examples(runs: Sequence[Run]) -> tuple[str, list[Example]]:
    """(where they are from, the first right and the first wrong response of EACH different problems)."""
    step = final_step(runs)
    run = next((run for run in runs if step in run.dumps), None)
    if run is None or step is None:
        return "", []
    found: dict[bool, dict[str, Example]] = {True: {}, False: {}}
    for line in read_lines(run.dumps[step], _TEXTS, []):
        score = scored(line)
        if score not in (0.0, 1.0) or is_later_output(line.uid):
            continue
        of_kind, prompt = found[score == 1.0], str(line.input)
        if len(of_kind) < EACH and prompt not in of_kind:
            of_kind[prompt] = Example(score == 1.0, *map(_shortened, (prompt, str(line.output), str(line.gts))))
        if min(map(len, found.values())) == EACH:
            break
    return f"{run.name}, step {step}", [example for kind in found.values() for example in kind.values()]


def _shortened(text: str) -> str:
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    return f"{text[: LONGEST // 2]}\n[… {left_out} characters …]\n{text[-LONGEST // 2 :]}"
