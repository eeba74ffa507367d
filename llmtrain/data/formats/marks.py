"""Streams whose tokens have loss weights of their own.

Beside the shards of tokens lies the folder ``marks``, MDS shards with one byte for each token: the
highest bit says that the token begins a document, the others are the number of its weight in the
table ``weights`` of ``stream.json``. Documents are told by the bit, not by a separator, which chat
templates also write between the turns of one conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.formats.flat import FlatSource, Parts
from llmtrain.data.mds_writer import STARTS


class MarkedSource(FlatSource):
    """A stream with marks. table: [weights] float32.

    window: conversations lie whole in windows of so many tokens; None: anywhere.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        marks: FlatSource,
        table: Sequence[float],
        window: int | None,
        **more: Any,
    ) -> None:
        super().__init__(name, parts, **more)
        self.marks = marks
        self.table = np.array(table, np.float32)
        self.window = window

    def document_starts(
        self, start: int, stop: int, tokens: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self.marks.read(start, stop) & STARTS) != 0
        return found

    def loss_weights(self, start: int, stop: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.table[self.marks.read(start, stop) & (STARTS - 1)]
        return found

    def verify(self) -> int:
        return super().verify() + self.marks.verify()

    def close(self) -> None:
        super().close()
        self.marks.close()
