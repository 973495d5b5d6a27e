"""CountSketch (Charikar, Chen and Farach-Colton 2002): long gradients as K numbers whose inner products stay unbiased.

Their standard deviation is at most √(2/K) of the product of the norms. No matrix of D × K exists.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

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
        seed: of h and σ.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
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
            key = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "big")
            generator = torch.Generator().manual_seed(key)
            self._drawn[name] = torch.randint(2 * self.size, (count,), generator=generator, dtype=torch.int32)
        return self._drawn[name]
