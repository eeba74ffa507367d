"""Batches: this rank's part of every global batch, read ahead in the background."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.config.schema import DataConfig, RunConfig
from llmtrain.data.batch import Batch
from llmtrain.data.catalogue import Catalogue, open_catalogue
from llmtrain.data.diet import Diet
from llmtrain.data.packing import Packing, Pick, Rows, samples_in
from llmtrain.data.plan import DataPlan
from llmtrain.data.source import TokenSource
from llmtrain.errors import DataError

_END = object()


def packing_of(data: DataConfig) -> Packing:
    """How windows become samples under the section ``data``."""
    return Packing(data.seq_len, data.document_mask, data.reset_positions)


def to_batch(rows: Rows, sources: NDArray[np.int64], numbers: NDArray[np.int64]) -> Batch:
    """A batch of ``rows``. sources: [n] source indices; numbers: [n] sample numbers."""
    arrays = (rows.tokens, rows.targets, rows.weights, rows.doc_ids, rows.positions)
    return Batch(*(torch.from_numpy(a) for a in (*arrays, sources, numbers)))


class Loader:
    """Samples of the plan, by number.

    rank, world: among the data-parallel ranks. The loader has no state but the plan: a batch is a
    function of its first sample's number. Where weights change online, reading ahead waits until
    the order of a batch is decided. ``wait_seconds``: how long ``iterate`` has kept its
    caller waiting so far.
    """

    def __init__(self, plan: DataPlan, batch_size: int, rank: int, world: int) -> None:
        """batch_size: sequences in a global batch, a multiple of ``world``."""
        assert batch_size % world == 0
        self.plan, self.batch_size, self.rank, self.world = plan, batch_size, rank, world
        self.wait_seconds = 0.0
        self._diet = Diet()
        self._packing = packing_of(plan.cfg.data)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def from_config(cls, plan: DataPlan, cfg: RunConfig, rank: int, world: int) -> Loader:
        """The loader of a training run, with its ``data.diet``."""
        loader = cls(plan, cfg.train.global_batch_size, rank, world)
        loader._diet = Diet.of(cfg)
        return loader

    def batch(self, step: int) -> Batch:
        """This rank's rows of global batch ``step`` (0 is the first). Under a diet the tokens may
        be those of an earlier one; ``sample_ids`` are always the step's own."""
        first = step * self.batch_size
        return self.batch_at(first, self._diet.drawn(first))

    def batch_at(self, first_sample: int, drawn: int | None = None) -> Batch:
        """This rank's rows of the global batch that begins with global sample ``first_sample``.

        drawn: the sample whose tokens stand there instead, and so on.
        """
        n = self.batch_size // self.world
        low = first_sample + self.rank * n
        begin = low if drawn is None else drawn + self.rank * n
        labels, numbers, weights = self.plan.samples(begin, begin + n)
        picks = zip(labels.tolist(), numbers.tolist(), weights.tolist(), strict=True)
        rows = self._packing.rows(
            [Pick(self.plan.sources[label], number, weight) for label, number, weight in picks]
        )
        self._check_vocabulary(rows, labels, low)
        return to_batch(rows, labels, np.arange(low, low + n))

    def _check_vocabulary(self, rows: Rows, labels: NDArray[np.int64], low: int) -> None:
        limit = self.plan.cfg.model.vocab_size or self.plan.vocab_size
        if limit is None:
            return
        bad = np.flatnonzero(
            (rows.tokens.max(1) >= limit)
            | (rows.targets.max(1) >= limit)
            | (rows.tokens.min(1) < 0)
            | (rows.targets.min(1) < 0)
        )
        if len(bad):
            row = int(bad[0])
            both = np.concatenate([rows.tokens[row], rows.targets[row]])
            worst = int(both.max() if both.max() >= limit else both.min())
            raise DataError(
                f"data source {self.plan.names[labels[row]]!r}: sample {low + row} holds the token "
                f"id {worst}, but the vocabulary ends at {limit - 1}; prepare the data with the "
                "model's tokenizer, or set model.vocab_size and the source's dtype to fit"
            )

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps [start, stop), read ahead by ``data.prefetch`` batches in a thread.

        What goes wrong while reading is raised here, at the batch it belongs to.
        """
        ahead = self.plan.cfg.data.prefetch
        if ahead == 0:
            for step in range(start, stop):
                began = time.perf_counter()
                batch = self.batch(step)
                self.wait_seconds += time.perf_counter() - began
                yield batch
            return
        ready: queue.Queue[object] = queue.Queue(maxsize=ahead)
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(start, stop, ready), name="loader", daemon=True
        )
        self._thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - began
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                assert isinstance(item, Batch)
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _decided(self, steps: int) -> bool:
        """Wait until the order of the first ``steps`` batches is decided; False: stopped first."""
        while not self.plan.wait_until_known(steps * self.batch_size, 0.1):
            if self._stop.is_set():
                return False
        return True

    def _read_ahead(self, start: int, stop: int, ready: queue.Queue[object]) -> None:
        for step in range(start, stop + 1):
            if not self._decided(min(step + 1, stop)):
                return
            item: object
            try:
                item = self.batch(step) if step < stop else _END
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return


class HeldoutSet:
    """The first samples of a held-out source, the same at every evaluation.

    samples: at most so many. bytes_per_token: UTF-8 bytes of text per token, None if unknown.
    """

    def __init__(
        self,
        name: str,
        source: TokenSource,
        data: DataConfig,
        samples: int,
        bytes_per_token: float | None,
    ) -> None:
        self.name, self.bytes_per_token = name, bytes_per_token
        self.samples = min(samples, samples_in(source.num_tokens, data.seq_len))
        self._source, self._packing = source, packing_of(data)

    def batches(self, size: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's share in batches of at most ``size`` rows.

        Every rank gets as many batches, all of one shape; rows beyond the end weigh 0.
        """
        share = -(-self.samples // world)
        n = min(size, share)
        for offset in range(0, share, n):
            first = rank * share + offset
            end = min((rank + 1) * share, self.samples)
            rows = self._packing.rows(
                [Pick(self._source, i, 1.0) if i < end else None for i in range(first, first + n)]
            )
            yield to_batch(rows, np.zeros(n, np.int64), np.arange(first, first + n))


def heldout_sets(cfg: RunConfig, catalogue: Catalogue | None = None) -> list[HeldoutSet]:
    """The held-out sets of a config: of its corpus and of ``data.heldout``."""
    known = catalogue if catalogue is not None else open_catalogue(cfg)
    sets = [
        HeldoutSet(
            name,
            known.open_heldout(name),
            cfg.data,
            cfg.eval.samples,
            known.bytes_per_token.get(name),
        )
        for name in known.heldout
    ]
    return [one for one in sets if one.samples]
