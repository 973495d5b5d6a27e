"""The score gradient of each response, s_i = Σ_t ∇ log π(o_it | q, o_i<t), at the valid tokens of the response.

π is the policy that was sampled: the softmax of logits/T, in float32, the end-of-sequence token included and nothing
after it. On policy the PPO ratio is 1, so the paper's gradient is g_i = A_i s_i; the scalars A_i are kept beside.

One plain backward pass a response, without padding. Only the chosen parameters require a gradient, so that for the last
layer autograd stops there. Logits are computed at the response's positions alone.

Memory: the model and one gradient of the chosen parameters in float32, about four matrices of response length ×
vocabulary, one prompt's result. With a projection (CountSketch; Charikar, Chen and Farach-Colton 2002) a gradient is
stored as K numbers, and no matrix of D × K exists: entry j is added to one of K buckets with a random sign. Inner
products stay unbiased; their standard deviation is at most √(2/K) of the product of the norms. Each of the P parts of
the model (`parts_of`) has K/P numbers for itself, so that parts can be told apart: √(2P/K) for products of one part.

Covered: any causal LM of transformers; tied parameters count once; a call that was stopped goes on where it was; a
folder of other settings is refused. Not covered: several GPUs. On a GPU some sums have no fixed order, so a second run
agrees up to rounding and not to the byte.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models, store
from vlnorm_verl.lab.store import Group, Stored, load

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["CountSketch", "Group", "Stored", "compute", "load", "parts_of", "score_gradient", "select_parameters"]

LAST_QKV = "last-qkv"
ALL = "all"
PROJECT_ABOVE = 1_000_000  # entries; beyond it gradients are projected unless told otherwise
PROJECTION = 65_536  # to so many

# <layers>.<number>.<…>.<projection>.<weight or bias>: separate as in Qwen and Llama, or fused as in GPT-NeoX or GPT-2.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "W_pack", "qkv")
_QKV = re.compile(rf"^(?:.*?\.)?(\d+)\.(?:.*\.)?({'|'.join(_SEPARATE + _FUSED)})\.(?:weight|bias)$")
_SHOWN = 8  # names in an error message


def compute(
    out: Path,
    modules: str = LAST_QKV,
    projection: int | None = None,
    checkpointing: bool = False,
    folder: str = "gradients",
    console: Console | None = None,
    on_group: Callable[[int], None] | None = None,
) -> None:
    """Write the score gradients of all rollouts in `out`, one file a prompt; goes on where an earlier call stopped.

    Args:
        out: the lab's folder, with rollouts.
        modules: see `select_parameters`.
        projection: K, numbers that a gradient is projected to, of which each part has its share; a part that is not
            longer stays as it is. 0 for none; None for PROJECTION where the chosen parameters have more than
            PROJECT_ABOVE entries, and none otherwise.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        folder: of the gradients in `out`; another one for each other choice of modules.
        console: where progress is shown.
        on_group: called with the prompt's number after each file.

    Raises:
        UserError: a request that cannot be met, gradients of other settings in the folder, or weights that are not
            those that were sampled from.
    """
    console = console or Console()
    if projection is not None and projection < 0:
        raise UserError(f"--projection {projection}: must be 0 (none) or more")
    sampled = store.read_settings(out)
    resolved = models.resolve(sampled["model"], out)
    if models.fingerprint(resolved) != sampled["weights"]:
        raise UserError(
            f"the weights of {sampled['model']} are not those that {out / store.ROLLOUTS} was sampled from: "
            "the gradients would not be on policy; sample again, into another --out"
        )
    model = models.load_model(resolved)
    chosen = select_parameters(model, modules)
    parts = parts_of(list(chosen))
    chosen = {name: chosen[name] for names in parts.values() for name in names}  # the columns of a part together
    sizes = {name: parameter.numel() for name, parameter in chosen.items()}
    if projection is None:
        projection = PROJECTION if sum(sizes.values()) > PROJECT_ABOVE else 0
    share = projection // len(parts) if projection else sum(sizes.values())
    if share == 0:
        raise UserError(
            f"--projection {projection}: fewer numbers than the {len(parts)} parts of the chosen parameters"
        )
    entries = {part: sum(sizes[name] for name in names) for part, names in parts.items()}
    widths = {part: min(size, share) for part, size in entries.items()}
    settings = {
        "format": store.FORMAT,
        "rollouts_sha256": store.rollouts_sha256(out),
        "names": list(chosen),
        "sizes": list(sizes.values()),
        "parts": widths,
    }
    path = out / folder / store.SETTINGS
    if path.exists():
        store.refuse_other(out / folder, json.loads(path.read_text(encoding="utf-8")), settings)
    with store.replaced(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if checkpointing:
        _checkpoint(model)
    sketches = {part: CountSketch(width) if width < entries[part] else None for part, width in widths.items()}
    counts = [len(rollouts.responses) for rollouts in store.read_rollouts(out)]
    missing = [i for i in range(len(counts)) if not store.gradient_path(out / folder, i).exists()]
    size, width = sum(entries.values()), sum(widths.values())
    console.print(
        f"score gradients of {len(chosen)} parameters, {size:,} entries"
        + (f" projected to {width:,}" if width < size else ""),
        markup=False,
        highlight=False,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        done = sum(counts) - sum(counts[index] for index in missing)
        bar = progress.add_task("score gradients", total=sum(counts), completed=done)
        for index, rollouts in enumerate(store.read_rollouts(out)):
            if index not in missing:
                continue
            rows: np.ndarray = np.empty((counts[index], width), dtype=np.float32)
            for row, response in enumerate(rollouts.responses):
                gradient = score_gradient(model, chosen, rollouts.prompt_ids, response, sampled["temperature"])
                of_parts = [
                    sketch(part) if sketch else _flat(part.values())
                    for part, sketch in (({n: gradient[n] for n in parts[p]}, sketches[p]) for p in parts)
                ]
                rows[row] = _flat(of_parts).cpu().numpy()
                progress.update(bar, advance=1)
            if not np.isfinite(rows).all():
                raise UserError(f"prompt {index}: a score gradient is not finite; the model overflows in float32")
            file = store.gradient_path(out / folder, index)
            with store.replaced(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, rows)
            if on_group:
                on_group(index)


def score_gradient(
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    temperature: float,
) -> dict[str, torch.Tensor]:
    """∇ Σ_t log π(o_t | q, o_<t) of one response.

    Args:
        model: in evaluation mode.
        parameters: what to differentiate by, all of them requiring a gradient.
        prompt_ids: tokens of the prompt, at least one.
        response_ids: tokens of the response, at least one; the end token is one of them.
        temperature: T; log π is the log-softmax of logits/T.

    Returns:
        The gradient of each parameter, in its shape; 0 where the response does not depend on it.
    """
    import torch

    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    # The last token predicts nothing: it goes in as a target alone. Token t is predicted at the position before it.
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(response_ids)).logits[0]  # [L, V]
    negative = torch.nn.functional.cross_entropy(logits / temperature, ids[0, -len(response_ids) :], reduction="sum")
    gradients = torch.autograd.grad(-negative, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _flat(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _checkpoint(model: PreTrainedModel) -> None:
    """Turn on transformers' gradient checkpointing, which acts in training mode only, without any dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: train() would reach the dropouts in it


# ------------------------------------------------------------------------------------------------------- parameters


def select_parameters(model: torch.nn.Module, modules: str) -> dict[str, torch.nn.Parameter]:
    """The parameters to differentiate by; each once, tied ones under their first name.

    Args:
        model: any module.
        modules: "last-qkv" (query, key and value projections of the last layer that has them, weights and biases, as
            in the paper's Figure 4), "all", or a regular expression that is searched in the parameters' names.

    Raises:
        UserError: nothing matches; the message lists what is near.
    """
    # With the second names of tied parameters, so that lm_head finds what is tied to it.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if modules == ALL:
        wanted = set(names)
    elif modules == LAST_QKV:
        wanted = _last_qkv(names)
    else:
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise UserError(
                f"--modules {modules!r} is not a regular expression ({error}). Accepted: {LAST_QKV}, {ALL}, or one"
            ) from error
        wanted = {name for name in names if pattern.search(name)}
        if not wanted:
            raise UserError(
                f"--modules {modules!r} matches no parameter. Near: {', '.join(_near(modules, names))}. "
                f"Accepted: {LAST_QKV}, {ALL}, or a regular expression"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    identities = {id(parameters[name]) for name in wanted}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in identities}


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters by part: layers ("layer 3", and "other"), or modules ("q_proj") where there is one layer only."""
    layers = [match[1] if (match := re.search(r"(?:^|\.)(\d+)\.", name)) else "" for name in names]
    several = len(set(layers)) > 1
    parts: dict[str, list[str]] = {}
    for name, layer in zip(names, layers, strict=True):
        module = name.rpartition(".")[0].rpartition(".")[2] or name
        part = module if not several else f"layer {layer}" if layer else "other"
        parts.setdefault(part, []).append(name)
    return parts


def _last_qkv(names: list[str]) -> set[str]:
    matches = [(name, int(match[1]), match[2]) for name in names if (match := _QKV.match(name))]
    last = max((layer for _, layer, _ in matches), default=None)
    found = {name: projection for name, layer, projection in matches if layer == last}
    if set(found.values()) >= set(_SEPARATE) or set(found.values()) & set(_FUSED):
        return set(found)
    candidates = _distinct([name for name in names if "attn" in name.lower() or "attention" in name.lower()] or names)
    raise UserError(
        f"--modules {LAST_QKV}: this model has no {', '.join(_SEPARATE)} and none of {', '.join(_FUSED)} in a numbered "
        f"layer. Give a regular expression; its parameters: {', '.join(candidates[:_SHOWN])}"
    )


def _distinct(names: list[str]) -> list[str]:
    """Without the layers' numbers: one name for the same parameter of all layers."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def _near(pattern: str, names: list[str]) -> list[str]:
    plain = re.sub(r"\\[a-zA-Z]|[\\^$*+?()\[\]{}|]", "", pattern)
    whole = {part: name for name in reversed(_distinct(names)) for part in (name, *name.split("."))}
    hits = difflib.get_close_matches(plain.split(".")[-1], whole, n=_SHOWN, cutoff=0.5)
    return list(dict.fromkeys(whole[hit] for hit in hits)) or _distinct(names)[:_SHOWN]


# ------------------------------------------------------------------------------------------------------- projection


class CountSketch:
    """Projects gradients to K numbers: entry j of a parameter is added to bucket h(j) with sign σ(j).

    h and σ are a hash (splitmix64) of the parameter's name and j, computed where the gradient is: the same on every
    device, in every process and for every chunk size. Those of the first `chunk` entries are kept, of more they are
    computed anew for each gradient. The sketches of the chosen parameters add up, so their order does not matter.

    Args:
        size: K.
        seed: of the hash.
        chunk: entries at a time, which bounds the memory.
    """

    def __init__(self, size: int, seed: int = 0, chunk: int = 1 << 22) -> None:
        self.size = size
        self.seed = seed
        self.chunk = chunk
        self._kept: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            gradients: name of each parameter and its gradient, of any shape.

        Returns:
            [K] in the dtype of the gradients.
        """
        import torch

        first = next(iter(gradients.values()))
        sketch = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        for name, gradient in gradients.items():
            for start, part in self._parts(gradient.reshape(-1)):
                bucket, sign = self._buckets(name, start, part)
                sketch.index_add_(0, bucket, part * sign)
        return sketch

    def _buckets(self, name: str, start: int, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h(j) and σ(j) of the entries of a chunk."""
        if (name, start) in self._kept:
            return self._kept[name, start]
        hashed = self._hash(name, start, part)
        # The lowest bit is the sign, the others choose the bucket.
        found = _shift(hashed, 1) % self.size, (1 - 2 * (hashed % 2)).to(part.dtype)
        if sum(len(bucket) for bucket, _ in self._kept.values()) + len(part) <= self.chunk:
            self._kept[name, start] = found
        return found

    def _parts(self, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(flat), self.chunk):
            yield start, flat[start : start + self.chunk]

    def _hash(self, name: str, start: int, part: torch.Tensor) -> torch.Tensor:
        """splitmix64 (Steele, Lea and Flood 2014) of j = start, start + 1, …; int64, whose products wrap as in C."""
        import torch

        key = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "big", signed=True)
        state = torch.arange(start + 1, start + 1 + len(part), device=part.device) * _signed(0x9E3779B97F4A7C15) + key
        state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
        return state ^ _shift(state, 31)


def _signed(value: int) -> int:
    """The signed integer of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(values: torch.Tensor, by: int) -> torch.Tensor:
    """Right shift of the bits; torch's own repeats the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)
