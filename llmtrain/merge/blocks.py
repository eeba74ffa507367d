"""Blocks of one tensor of all models, and threads that work on several of them at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from llmtrain.merge.sources import Reader, require_finite

T = TypeVar("T")

# Elements of a block: four blocks of float32 fit a core's cache.
BLOCK = 1 << 18
# Finished or waiting pieces of work per thread.
_AHEAD = 2


class Workers:
    """Threads with one core each, as many as torch would use; a context manager.

    Reading, arithmetic, and hashing release the interpreter's lock, so blocks are read and
    merged while earlier ones are written.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = torch.get_num_threads() if count is None else count
        self._pool = ThreadPoolExecutor(self.count) if self.count > 1 else None

    def __enter__(self) -> Workers:
        # Threads made from now on begin with this number, and this one has only sums to make.
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def ordered(self, work: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Results in the order of ``work``, of which only a few pieces are taken ahead."""
        if self._pool is None:
            for piece in work:
                yield piece()
            return
        waiting: deque[Future[T]] = deque()
        for piece in work:
            waiting.append(self._pool.submit(piece))
            if len(waiting) > _AHEAD * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class Inputs:
    """One tensor of all models. name, numel: of the tensor. base: of the base model, if any.

    dtype: of the arithmetic. fishers: of the same shape, one per model, for the method that
    needs them.
    """

    name: str
    numel: int
    dtype: torch.dtype
    base: Reader | None
    models: list[Reader]
    fishers: list[Reader]
    workers: Workers

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Blocks of the tensor."""
        for begin in range(0, self.numel, BLOCK):
            yield begin, min(begin + BLOCK, self.numel)

    def each(self, function: Callable[[int, int], T]) -> Iterator[T]:
        """``function(begin, end)`` of every block, in order."""
        return self.workers.ordered(
            lambda begin=begin, end=end: function(begin, end)  # type: ignore[misc]
            for begin, end in self.ranges()
        )

    def read(self, reader: Reader, begin: int, end: int) -> Tensor:
        """A block in the dtype of the arithmetic; free to be written to.

        Raises CheckpointError naming tensor and file when a value is NaN or infinite.
        """
        block = reader.block(begin, end).to(self.dtype)
        require_finite(block, self.name, reader.path)
        return block

    def base_block(self, begin: int, end: int) -> Tensor:
        """A block of the base model."""
        assert self.base is not None
        return self.read(self.base, begin, end)

    def blocks(self, begin: int, end: int) -> list[Tensor]:
        """A block of every model."""
        return [self.read(reader, begin, end) for reader in self.models]

    def close(self) -> None:
        """Release the files."""
        for reader in (*([self.base] if self.base else []), *self.models, *self.fishers):
            reader.close()
