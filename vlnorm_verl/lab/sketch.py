"""CountSketch (Charikar, Chen and Farach-Colton 2002): long gradients as K numbers whose inner products stay unbiased.

Their standard deviation is at most √(2/K) of the product of the norms. No matrix of D × K exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlnorm_verl.files import UserError

if TYPE_CHECKING:
    import torch

_AT_A_TIME = 1 << 22  # entries, which bounds the memory of the signs and buckets of a large parameter


class CountSketch:
    """Projects gradients to K numbers: entry j of a parameter is added to bucket h(j) with sign σ(j).

    h and σ are drawn by torch's generator of the CPU, seeded by the parameter's name: the same on every device and in
    every process. They are drawn once and kept in the CPU's memory, four bytes an entry. The sketches of the chosen
    parameters add up, so their order does not matter.

    Args:
        size: K.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._drawn: dict[str, torch.Tensor] = {}

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
            flat = gradient.reshape(-1)
            drawn = self._draw(name, len(flat))
            for entries, numbers in zip(flat.split(_AT_A_TIME), drawn.split(_AT_A_TIME), strict=True):
                numbers = numbers.to(flat.device)
                sketch.index_add_(0, numbers >> 1, entries * (1 - 2 * (numbers & 1)))
        return sketch

    def _draw(self, name: str, count: int) -> torch.Tensor:
        """2 h(j) + [σ(j) = −1] of each entry, int32 [count]."""
        import torch

        if name not in self._drawn:
            # The 0 is what every stored sketch was drawn with.
            key = int.from_bytes(hashlib.sha256(f"0 {name}".encode()).digest()[:8], "big")
            generator = torch.Generator().manual_seed(key)
            self._drawn[name] = torch.randint(2 * self.size, (count,), generator=generator, dtype=torch.int32)
        return self._drawn[name]


class Projection:
    """Gradients as a few numbers for each part of the model: a CountSketch, or the entries where they are not more.

    Args:
        parts: {part: names of its parameters}.
        sizes: {name of a parameter: its entries}.
        size: K of all parts together; each has the same share.

    Raises:
        UserError: fewer numbers than parts.
    """

    def __init__(self, parts: Mapping[str, Sequence[str]], sizes: Mapping[str, int], size: int) -> None:
        share = size // len(parts)
        if share == 0:
            raise UserError(f"--projection {size}: fewer numbers than the {len(parts)} parts of the chosen parameters")
        entries = {part: sum(sizes[name] for name in names) for part, names in parts.items()}
        self.parts = parts
        self.widths = {part: min(count, share) for part, count in entries.items()}
        self._sketches = {part: CountSketch(share) for part, count in entries.items() if count > share}

    def __call__(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[Σ widths] in the order of the parts."""
        import torch

        columns: list[torch.Tensor] = []
        for part, names in self.parts.items():
            of_part = {name: gradients[name] for name in names}
            sketch = self._sketches.get(part)
            columns += [sketch(of_part)] if sketch else [gradient.reshape(-1) for gradient in of_part.values()]
        return torch.cat(columns)
