"""The score gradient of each response, s_i = Σ_t ∇ log π(o_it | q, o_i<t), at the valid tokens of the response.

π is the policy that was sampled: the softmax of logits/T, in float32, the end-of-sequence token included and nothing
after it. On policy the PPO ratio is 1, so the paper's gradient is g_i = A_i s_i; the scalars A_i are kept beside.

One plain backward pass a response, without padding. Only the chosen parameters require a gradient, so that for the last
layer autograd stops there. Logits are computed at the response's positions alone. A prompt goes forward once for all of
its responses, if one of the first prompt's has the same gradient without that.

Memory: the model and one gradient of the chosen parameters in float32, about three matrices of response length ×
vocabulary, one prompt's keys and values, and the activations of the layers from the first chosen one on, or of one
layer with checkpointing. Where the prompt is not shared, a layer with grouped heads has heads × tokens² numbers among
them on a GPU: in float32 PyTorch has no other kernel for what transformers asks of it (`use_gqa_in_sdpa`).

With a projection (sketch.py) a gradient is stored as K numbers. Each of the P parts of the model
(`parameters.parts_of`) has K/P of them for itself, so that parts can be told apart: products of one part have a
standard deviation of at most √(2P/K) of the product of the norms.

Covered: any causal LM of transformers; tied parameters count once; a call that was stopped goes on where it was; a
folder of other settings is refused. Not covered: several GPUs. On a GPU some sums have no fixed order, so a second run
agrees up to rounding and not to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vlnorm_verl.files import UserError, whole, write_json
from vlnorm_verl.lab import models, store
from vlnorm_verl.lab.parameters import LAST_QKV, parts_of, select_parameters
from vlnorm_verl.lab.sketch import Projection
from vlnorm_verl.tasks.base import content_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Prompt = list[tuple["torch.Tensor", "torch.Tensor"]]  # its keys and values in each layer, see `keys_and_values`

PROJECT_ABOVE = 1_000_000  # entries; beyond it gradients are projected unless told otherwise
PROJECTION = 65_536  # to so many
ENOUGH = 32  # tokens of a response that shows whether a prompt can be shared
ALIKE = 1e-3  # of the gradient: what float32 may make of another order of sums, with room


def compute(
    out: Path,
    modules: str = LAST_QKV,
    projection: int | None = None,
    checkpointing: bool = False,
) -> None:
    """Write the score gradients of all rollouts in `out`, one file a prompt; goes on where an earlier call stopped.

    Args:
        out: the lab's folder, with rollouts.
        modules: see `select_parameters`.
        projection: K, numbers that a gradient is projected to, of which each part has its share; a part that is not
            longer stays as it is. 0 for none; None for PROJECTION where the chosen parameters have more than
            PROJECT_ABOVE entries, and none otherwise.
        checkpointing: recompute activations in the backward pass: less memory for all parameters, about a third more
            time. For the last layer's it saves next to nothing, and no prompt is shared.

    Raises:
        UserError: a request that cannot be met, gradients of other settings in the folder, or weights that are not
            those that were sampled from.
    """
    sampled = store.read_settings(out)
    resolved = models.resolve(sampled["model"], out)
    if models.fingerprint(resolved) != sampled["weights"]:
        raise UserError(
            f"the weights of {sampled['model']} are not those that {out / store.ROLLOUTS} was sampled from: "
            "the gradients would not be on policy; sample again, into another --out"
        )
    model = models.load_model(resolved)
    chosen, projected = choose(model, modules, projection)
    sizes = {name: parameter.numel() for name, parameter in chosen.items()}
    size, width = sum(sizes.values()), sum(projected.widths.values())
    settings = {
        "format": store.FORMAT,
        "rollouts_sha256": content_sha256(out / store.ROLLOUTS),
        "names": list(chosen),
        "sizes": list(sizes.values()),
        "parts": projected.widths,
    }
    choice = store.folder_of(modules)
    folder = out / store.GRADIENTS / choice
    path = folder / store.SETTINGS
    if path.exists():
        store.refuse_other(folder, json.loads(path.read_text(encoding="utf-8")), settings)
    write_json(path, settings)

    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if checkpointing:
        _checkpoint(model)
    files = store.gradient_files(out, choice)
    missing = {file: rollouts for file, rollouts in files.items() if not file.exists()}
    total, left = (sum(len(rollouts.responses) for rollouts in each.values()) for each in (files, missing))
    fewer = f" projected to {width:,}" if width < size else ""
    print(f"score gradients of {len(chosen)} parameters, {size:,} entries{fewer}")
    # What is recomputed keeps no keys and values. Of most parameters two gradients, to compare, would not fit.
    share = bool(missing) and not checkpointing and 2 * size < model.num_parameters()
    with tqdm(desc="score gradients", total=total, initial=total - left, mininterval=5) as bar:
        if share and (why := why_not_shared(model, chosen, next(iter(files.values())), sampled["temperature"])):
            bar.write(f"each prompt is computed for each response: this model cannot share it ({why})")
            share = False
        for file, rollouts in missing.items():
            prompt = keys_and_values(model, rollouts.prompt_ids) if share else None
            rows: np.ndarray = np.empty((len(rollouts.responses), width), dtype=np.float32)
            for row, response in enumerate(rollouts.responses):
                gradient = score_gradient(model, chosen, rollouts.prompt_ids, response, sampled["temperature"], prompt)
                rows[row] = projected(gradient).cpu().numpy()
                del gradient  # its memory is for the next one
                bar.update()
            if not np.isfinite(rows).all():
                raise UserError(f"{file}: a score gradient is not finite; the model overflows in float32")
            with whole(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, rows)


def choose(
    model: torch.nn.Module, modules: str, projection: int | None
) -> tuple[dict[str, torch.nn.Parameter], Projection]:
    """The parameters to differentiate by, and what projects their gradients; see `compute`.

    Raises:
        UserError: no parameter matches, or there are more parts than numbers.
    """
    chosen = select_parameters(model, modules)
    parts = parts_of(list(chosen))
    chosen = {name: chosen[name] for names in parts.values() for name in names}  # the columns of a part together
    sizes = {name: parameter.numel() for name, parameter in chosen.items()}
    size = sum(sizes.values())
    if projection is None:
        projection = PROJECTION if size > PROJECT_ABOVE else 0
    return chosen, Projection(parts, sizes, projection or len(parts) * size)


def score_gradient(
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    temperature: float,
    prompt: Prompt | None = None,
) -> dict[str, torch.Tensor]:
    """∇ Σ_t log π(o_t | q, o_<t) of one response.

    Args:
        model: in evaluation mode.
        parameters: what to differentiate by, all of them requiring a gradient.
        prompt_ids: tokens of the prompt, at least one.
        response_ids: tokens of the response, at least one; the end token is one of them.
        temperature: T; log π is the log-softmax of logits/T.
        prompt: its keys and values, to save computing them.

    Returns:
        The gradient of each parameter, in its shape; 0 where the response does not depend on it.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    # The last token predicts nothing: it goes in as a target alone. Token t is predicted at the position before it.
    if prompt:
        past = {"past_key_values": DynamicCache(prompt), "use_cache": True}  # what a response adds to it is its own
        output = model(input_ids=ids[:, len(prompt_ids) - 1 : -1], **past)
    else:
        output = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(response_ids))
    logits = output.logits[0]  # [L, V]
    negative = torch.nn.functional.cross_entropy(logits / temperature, ids[0, -len(response_ids) :], reduction="sum")
    del output, logits  # which the backward pass does not need
    gradients = torch.autograd.grad(
        -negative, list(parameters.values()), retain_graph=bool(prompt), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def keys_and_values(model: PreTrainedModel, prompt_ids: Sequence[int]) -> Prompt:
    """Of each layer at all positions of a prompt but its last, [1, heads, T - 1, head size], with their graph.

    Empty for a prompt of one token.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    if len(prompt_ids) > 1:
        ids = torch.tensor([prompt_ids[:-1]], device=model.device)
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def why_not_shared(
    model: PreTrainedModel,
    parameters: dict[str, torch.nn.Parameter],
    rollouts: store.Rollouts,
    temperature: float,
) -> str:
    """Why a response's gradient cannot be had from its prompt's keys and values; "" where it is the same."""
    import torch

    names = "rope_parameters", "rope_scaling"  # transformers 5, 4
    rope = str([getattr(model.config, name, "") for name in names])
    if "dynamic" in rope or "longrope" in rope:
        return "its rotary embedding changes with the length"
    # The whole computation of a long one may not fit where the shared one does: the shortest that is long enough.
    response = min(rollouts.responses, key=lambda tokens: (len(tokens) < ENOUGH, abs(len(tokens) - ENOUGH)))
    asked = (model, parameters, rollouts.prompt_ids, response, temperature)
    try:
        shared = score_gradient(*asked, keys_and_values(model, rollouts.prompt_ids))
    except torch.OutOfMemoryError:  # which the whole computation would need more of
        raise
    except Exception as error:  # of a model whose layers or cache are of another kind
        return f"{type(error).__name__}: {error}"
    whole = score_gradient(*asked)
    squared = [(float((whole[k] - shared[k]).norm()) ** 2, float(whole[k].norm()) ** 2) for k in whole]
    differences, norms = map(sum, zip(*squared, strict=True))
    if differences <= ALIKE**2 * norms:
        return ""
    return f"its gradient of norm {norms**0.5:.3g} would be off by {differences**0.5:.3g}"


def _checkpoint(model: PreTrainedModel) -> None:
    """Turn on transformers' gradient checkpointing, which acts in training mode only, without any dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: train() would reach the dropouts in it
