"""Dropout at one place of the model."""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.ops import dropout, stream_number


class Dropout(nn.Module):
    """Drops a share ``p`` of x [..., d] in training, by the keys [...] of its tokens.

    name: of the stream, so that every place has masks of its own. keys None (evaluation,
    generation) or p 0: x itself.
    """

    def __init__(self, name: str, p: float) -> None:
        super().__init__()
        self.stream, self.p = stream_number(name), p

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None or not self.p or not self.training:
            return x
        return dropout(x, keys, self.stream, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"
