"""What the loader hands to the model."""

from __future__ import annotations

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
    sample_ids: [b] int64 global sample numbers.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    doc_ids: Tensor
    positions: Tensor
    source_ids: Tensor
    sample_ids: Tensor

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getitem__(self, rows: slice) -> Batch:
        """The sequences ``rows`` as views."""
        return Batch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device) -> Batch:
        """On ``device``; non-blocking copies."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
