"""A prompt goes once, not once for each response, through the layers that have no chosen parameter above or in them.

Those layers need no gradient: their keys and values at the prompt's positions are the same for every response, and so
is what the first layer above them is given there. From that layer on, prompt and response are computed anew, so the
gradient is whole. The model prepares masks and positions itself; layers that are not wanted hand their input on.

Covered: decoders whose layers are numbered in one list, with a cache of keys and values. Not covered: others; the
caller compares the first response with the plain computation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class PromptCache:
    """
    Args:
        model: in evaluation mode.
        below: layers without a chosen parameter in them or below them. above: the others, in order.
    """

    def __init__(self, model: PreTrainedModel, below: Sequence[torch.nn.Module], above: Sequence[torch.nn.Module]):
        self.model, self.below, self.above = model, below, above

    def start(self, prompt_ids: Sequence[int]) -> None:
        """Compute a prompt; the responses that follow are to it."""
        from transformers import DynamicCache

        self._cache, self._length = DynamicCache(), len(prompt_ids)
        self._prompt = self._inputs(prompt_ids)

    def logits(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """The model's logits at the last `keep` of the positions [1, T] of a prompt and a response to it: [keep, V]."""
        import torch

        of_response = ids[0, self._length :].tolist()
        inputs = torch.cat([self._prompt, self._inputs(of_response)], dim=1) if of_response else self._prompt
        self._cache.crop(self._length)
        with _skipped(self.below), _given(self.above[0], lambda _: inputs):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
        return logits

    def _inputs(self, ids: Sequence[int]) -> torch.Tensor:
        """What the first layer above is given at the positions that follow those in the cache, [1, T, H]."""
        import torch

        seen: list[torch.Tensor] = []
        tokens = torch.tensor([ids], device=self.model.device)
        with torch.no_grad(), _skipped(self.above), _given(self.above[0], seen.append):
            self.model.base_model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        return seen[0]


def prompt_cache(model: PreTrainedModel, names: Collection[str]) -> PromptCache | None:
    """For these parameters; None where no layer is below all of them."""
    places = [re.match(r"(.+?)\.(\d+)\.", name) for name in names]
    lists = {place and place[1] for place in places}
    first = min((int(place[2]) for place in places if place), default=0)
    if len(lists) > 1 or not first:
        return None
    layers = list(model.get_submodule(str(*lists)).children())
    return PromptCache(model, layers[:first], layers[first:])


@contextmanager
def _skipped(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Layers that hand their input on."""
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _given(layer: torch.nn.Module, function: Any) -> Iterator[None]:
    """Hands the layer's input to the function; what that returns, if not None, is the input instead."""

    def hook(_: Any, arguments: tuple[Any, ...]) -> Any:
        changed = function(arguments[0])
        return None if changed is None else (changed, *arguments[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
