"""Keys and values of the tokens that a model has read, for generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """What each of ``rows`` sequences has of keys and values, in every block of this process.

    Token j of a sequence lies in slot j of its row, so sequences of different lengths need no
    padding before them: what follows the shorter ones of a first forward is never looked at and
    overwritten later. capacity: most tokens of a row. Room for a block is made when it first
    writes. One cache serves one model; ``begin`` comes before each forward.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self._lengths, self._counts = [0] * rows, [0] * rows
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self.starts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = self.starts

    def begin(self, counts: Sequence[int]) -> None:
        """The next forward brings ``counts[i]`` more tokens of row i, the first in its row of
        the batch. What the forward before brought is kept from now on."""
        self._lengths = [n + c for n, c in zip(self._lengths, self._counts, strict=True)]
        self._counts = list(counts)
        assert max(n + c for n, c in zip(self._lengths, counts, strict=True)) <= self.capacity
        self.starts = torch.tensor(self._lengths, device=self.device)
        self.last = torch.tensor(counts, device=self.device) - 1

    @property
    def empty(self) -> bool:
        """Whether the next forward brings the first tokens of every row."""
        return not any(self._lengths)

    def positions(self, width: int) -> Tensor:
        """[rows, width] int64: position of every token of the batch of the next forward."""
        return self.starts[:, None] + torch.arange(width, device=self.device)

    def visible(self, width: int) -> Tensor:
        """Bool [rows, width, slots]: which slots each token of the batch sees."""
        slots = torch.arange(max(self._lengths) + width, device=self.device)
        return slots <= self.positions(width)[..., None]

    def write(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v [rows, g, width, d] of the batch into a block's slots; returns the slots
        [rows, g, slots, d] that ``visible`` speaks of."""
        rows, groups, width, d = k.shape
        if block not in self._blocks:
            shape = (rows, groups, self.capacity, d)
            # Zeros: slots that nobody sees take part with weight 0, which NaN would survive.
            self._blocks[block] = (k.new_zeros(shape), v.new_zeros(shape))
        kept = self._blocks[block]
        index = self.positions(width)[:, None, :, None].expand(k.shape)
        for slots, new in zip(kept, (k, v), strict=True):
            slots.scatter_(2, index, new)
        reach = max(self._lengths) + width
        return kept[0][:, :, :reach], kept[1][:, :, :reach]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, which get the numbers 0, 1, ..."""
        index = torch.tensor(rows, device=self.device)
        self._lengths = [self._lengths[row] for row in rows]
        self._counts = [self._counts[row] for row in rows]
        self._blocks = {block: (k[index], v[index]) for block, (k, v) in self._blocks.items()}
