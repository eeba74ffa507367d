"""Doing a thing together: every rank takes part, and a failure on one is a failure on all."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from llmtrain.errors import CheckpointError, LlmtrainError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to the other ranks; user: it is the user's to mend."""

    rank: int
    text: str
    user: bool

    @classmethod
    def of(cls, rank: int, error: BaseException) -> _Failure:
        if isinstance(error, LlmtrainError):
            return cls(rank, str(error), True)
        return cls(rank, "".join(traceback.format_exception(error)), False)


class Ranks:
    """The ranks of a gloo group (None: this process alone), rank 0 being the main one.

    Each method is a collective: all ranks call it in the same order from the same thread. When a
    function raises anywhere, all ranks raise: CheckpointError with the first failing rank's
    sentence, or RuntimeError with its traceback for mistakes that are not the user's.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def aside(self, patience: timedelta) -> Ranks:
        """The same ranks with a group of their own, for a thread that works beside this one."""
        if self.group is None:
            return Ranks(None)
        return Ranks(dist.new_group(backend="gloo", timeout=patience))

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def reduce(self, own: Callable[[], T], merge: Callable[[list[T]], R]) -> R:
        """All ranks run ``own``; the main rank merges the values; all get the result."""
        return self._finish(self._broadcast(self._merge(own, merge)))

    def scatter(self, own: Callable[[], T], merge: Callable[[list[T]], list[R]]) -> R:
        """As ``reduce``, but ``merge`` returns one result per rank and each gets its own."""
        merged = self._merge(own, merge)
        if self.group is None:
            return self._finish(merged)[0]
        box: list[Any] = [None]
        shares: list[Any] | None = None
        if self.is_main:
            shares = [merged] * self.size if isinstance(merged, _Failure) else merged
        dist.scatter_object_list(box, shares, src=self._main, group=self.group)
        share: R | _Failure = box[0]
        return self._finish(share)

    def on_main(self, action: Callable[[], T]) -> T:
        """The main rank runs ``action``; all get its value."""
        return self.reduce(lambda: None, lambda _: action())

    def all(self, flag: bool) -> bool:
        """True when ``flag`` is true on every rank; one small collective."""
        if self.group is None:
            return flag
        box = torch.tensor([int(flag)])
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self.group)
        return bool(box.item())

    @property
    def _main(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    def _merge(self, own: Callable[[], T], merge: Callable[[list[T]], R]) -> R | _Failure | None:
        value: T | _Failure
        try:
            value = own()
        except Exception as error:
            if self.group is None:
                raise
            value = _Failure.of(self.rank, error)
        values: list[Any] | None = [value]
        if self.group is not None:
            values = [None] * self.size if self.is_main else None
            dist.gather_object(value, values, dst=self._main, group=self.group)
        if values is None:
            return None
        failure = next((v for v in values if isinstance(v, _Failure)), None)
        if failure is not None:
            return failure
        try:
            return merge(values)
        except Exception as error:
            if self.group is None:
                raise
            return _Failure.of(self.rank, error)

    def _broadcast(self, value: R | _Failure | None) -> R | _Failure | None:
        if self.group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self._main, group=self.group)
        return cast(R, box[0])

    def _finish(self, value: R | _Failure | None) -> R:
        if not isinstance(value, _Failure):
            return cast(R, value)
        where = f" (rank {value.rank} of {self.size})" if self.size > 1 else ""
        if value.user:
            raise CheckpointError(f"{value.text}{where}")
        raise RuntimeError(f"a process failed{where}\n{value.text}")
