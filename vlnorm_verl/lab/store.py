"""The lab's folder: rollouts and per-response gradients on disk, and how the analysis reads them.

    rollouts.jsonl                    the settings of the sampling, then a line for each prompt with its responses
    rollouts.partial.jsonl            the same while it is sampled, each prompt with its number once it is finished
    gradients/CHOICE/settings.json    what the gradients are of; a folder for each choice of parameters
    gradients/CHOICE/000.npy          score gradients of the first prompt's responses, float32 [n, D]; 001.npy …
    model/                            a verl checkpoint merged to a Hugging Face folder, where one was given
    vllm.log                          what vLLM printed, where it was the engine

Covered: all files but the partial one and the log appear whole or not at all; a folder made with other settings is
refused with what differs; gradients are memory-mapped, one prompt at a time.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlnorm_verl.files import UserError, differences, write
from vlnorm_verl.tasks.base import content_sha256

ROLLOUTS = "rollouts.jsonl"
PARTIAL = "rollouts.partial.jsonl"
GRADIENTS = "gradients"
SETTINGS = "settings.json"
FORMAT = 3  # of both files; raise it when either changes


@dataclass
class Group:
    """One prompt with its n responses, all sampled from the model whose gradients are stored (see gradients.py).

    Args:
        kind: "slope" (many responses, for how variance grows with length) or "pool" (few, as in training).
        lengths: int64 [n], response tokens L_i, the end-of-sequence token counted.
        rewards: float64 [n].
        advantages: float64 [n], A_i of GRPO, see `grpo_advantages`.
        score_gradients: float32 [n, D], s_i (or their projections), memory-mapped.
        truncated: bool [n], cut at the maximum response length.
    """

    kind: str
    lengths: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    score_gradients: np.ndarray
    truncated: np.ndarray

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ. Where they do not, A is 0, or what rounding leaves of it: 0.007 for 8 of 0.1."""
        return bool(np.ptp(self.rewards) > 0)


@dataclass
class Stored:
    """Everything that the lab stored about one model.

    Args:
        settings: of sampling and gradients.
        entries: of the parameters.
        dimension: D ≤ entries, columns of the score gradients; fewer where some are a CountSketch.
        parts: {part of the model: its columns}, see `parameters.parts_of`.
        groups: one for each prompt.
    """

    settings: dict[str, Any]
    entries: int
    dimension: int
    parts: dict[str, slice]
    groups: list[Group]


@dataclass
class Rollouts:
    """Responses to one prompt as sampled.

    Args:
        kind: as in `Group`.
        prompt: its text.
        prompt_ids: its tokens.
        responses: tokens of each response, the end-of-sequence token included where there is one.
        rewards: one for each response.
        truncated: whether a response was cut at the maximum length.
    """

    kind: str
    prompt: str
    prompt_ids: list[int]
    responses: list[list[int]]
    rewards: list[float]
    truncated: list[bool]


def grpo_advantages(rewards: np.ndarray) -> np.ndarray:
    """A_i = (r_i − mean)/(std + 1e-6) over the group, std unbiased, in float32 as verl computes it.

    Source: verl 0.9.1, trainer/ppo/core_algos.py, compute_grpo_outcome_advantage.

    Args:
        rewards: [n], of the responses to one prompt, n ≥ 2.

    Returns:
        float64 [n].
    """
    import torch

    scores = torch.as_tensor(rewards, dtype=torch.float32)
    return ((scores - scores.mean()) / (scores.std() + 1e-6)).double().numpy()


# ---------------------------------------------------------------------------------------------------------- rollouts


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of the sampling."""
    with (out / ROLLOUTS).open(encoding="utf-8") as file:
        return json.loads(file.readline())


def read_rollouts(out: Path) -> Iterator[Rollouts]:
    """One prompt after the other."""
    with (out / ROLLOUTS).open(encoding="utf-8") as file:
        file.readline()
        for line in file:
            yield Rollouts(**json.loads(line))


def write_rollouts(out: Path, settings: Mapping[str, Any], groups: Iterable[Rollouts]) -> None:
    """The finished file, whole or not at all."""
    lines = [settings, *(asdict(group) for group in groups)]
    write(out / ROLLOUTS, "".join(map(_line, lines)))


def finished_prompts(out: Path, settings: Mapping[str, Any]) -> dict[int, Rollouts]:
    """{number of the prompt: its rollouts}: what a call of these settings that was stopped has left. Starts the file.

    Raises:
        UserError: the call that was stopped had other settings.
    """
    path = out / PARTIAL
    if not path.exists():
        write(path, _line(settings))
        return {}
    *lines, torn = path.read_bytes().split(b"\n")
    refuse_other(path, json.loads(lines[0]), settings)
    if torn:  # the line that was being written
        write(path, b"\n".join([*lines, b""]))
    return {fields.pop("number"): Rollouts(**fields) for fields in map(json.loads, lines[1:])}


def keep_prompt(out: Path, number: int, rollouts: Rollouts) -> None:
    """Add a finished prompt to what a later call would go on from."""
    with (out / PARTIAL).open("a", encoding="utf-8") as file:
        file.write(_line({"number": number, **asdict(rollouts)}))


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------------------------------------- gradients


class Incomplete(UserError):
    """Some prompts have no gradients yet."""


def folder_of(modules: str) -> str:
    """A folder's name for a choice of parameters; the same name for the same choice only."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", modules).strip("-")
    return modules if plain == modules else f"{plain[:40]}-{zlib.crc32(modules.encode()):08x}"


def gradient_files(out: Path, choice: str) -> dict[Path, Rollouts]:
    """{file of a prompt's gradients, there or not: its rollouts}."""
    folder = out / GRADIENTS / choice
    return {folder / f"{index:03d}.npy": rollouts for index, rollouts in enumerate(read_rollouts(out))}


def load(out: Path, choice: str) -> Stored:
    """What the lab stored in `out`; gradients are memory-mapped, so nothing large is read here.

    Args:
        out: the lab's folder.
        choice: of parameters, as `folder_of` names it.

    Raises:
        Incomplete: prompts without gradients.
        UserError: the gradients are of other rollouts.
    """
    sampled = read_settings(out)
    folder = out / GRADIENTS / choice
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings["rollouts_sha256"] != content_sha256(out / ROLLOUTS):
        raise UserError(f"{folder} has the gradients of other rollouts than {out / ROLLOUTS}: compute them again")
    files = gradient_files(out, choice)
    if missing := sum(not file.exists() for file in files):
        raise Incomplete(f"{folder} lacks the gradients of {missing} prompts: compute again, which goes on there")
    ends = np.cumsum([0, *settings["parts"].values()]).tolist()
    groups: list[Group] = []
    for file, rollouts in files.items():
        rewards = np.array(rollouts.rewards, dtype=np.float64)
        groups.append(
            Group(
                kind=rollouts.kind,
                lengths=np.array([len(response) for response in rollouts.responses], dtype=np.int64),
                rewards=rewards,
                advantages=grpo_advantages(rewards),
                score_gradients=np.load(file, mmap_mode="r"),
                truncated=np.array(rollouts.truncated, dtype=bool),
            )
        )
    return Stored(
        settings={**sampled, **settings},
        entries=sum(settings["sizes"]),
        dimension=ends[-1],
        parts=dict(zip(settings["parts"], map(slice, ends, ends[1:]), strict=True)),
        groups=groups,
    )


def refuse_other(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: `path` was made with other settings than those asked for.
    """
    if differing := differences(there, asked):
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing)}): take another --out, or delete it"
        )
