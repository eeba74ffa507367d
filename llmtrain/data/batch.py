"""What the loader hands to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """Some sequences of one global batch. b: sequences, s: ``data.seq_len``.

    tokens: [b, s] int64 inputs. targets: [b, s] int64, the next token (0 where there is none).
    weights: [b, s] float32 loss weights, 0 on padding. doc_ids: [b, s] int32, number of the
    document within the sample, -1 on padding. positions: [b, s] int64, restarting at documents
    when ``data.reset_positions``. source_ids: [b] int64 index into the plan's source names.
    sample_ids: [b] int64 global sample numbers. first: [b, s] int32 or None; of a part of each
    sequence (context parallelism), the position in the whole one where a token's document begins.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    doc_ids: Tensor
    positions: Tensor
    source_ids: Tensor
    sample_ids: Tensor
    first: Tensor | None = None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getitem__(self, rows: slice) -> Batch:
        """The sequences ``rows`` as views."""
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device) -> Batch:
        """On ``device``; non-blocking copies."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: change(x) for name, x in values.items() if x is not None})
