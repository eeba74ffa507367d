"""Tokenizing documents in parallel, in order, with bounded memory.

Processes rather than the library's own threads: both are equally fast on two cores, but the
threads share one cache and one interpreter that turns their results into arrays.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.data.mds_writer import STARTS, token_dtype
from llmtrain.data.sources import Document
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.errors import EnvironmentFault

BATCH_CHARS = 1 << 19
BATCH_DOCUMENTS = 1024
LONGEST_TEXT = 1 << 19  # characters encoded at once: a token costs the library ~100 bytes


class Item(NamedTuple):
    """A document on its way: text, split key and, of a conversation, the spans of its weights."""

    text: str
    key: str | None
    spans: tuple[tuple[int, int], ...] | None = None


class Piece(NamedTuple):
    """Some documents of one split: their number, UTF-8 bytes and tokens, each ended by eos.

    marks: [tokens] uint8 of conversations: see ``data.formats.marks``.
    """

    documents: int
    bytes: int
    tokens: NDArray[Any]
    marks: NDArray[np.uint8] | None = None


class Encoded(NamedTuple):
    """A batch after tokenizing. ``taken`` documents went in, ``long`` of them were longer than a
    window and came out on neither side."""

    taken: int
    train: Piece
    heldout: Piece
    long: int = 0


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the document with this key is held out: a function of the key alone."""
    return xxhash.xxh64(key.encode()).intdigest() < fraction * 2.0**64


def batches(documents: Iterable[Document]) -> Iterator[list[Item]]:
    """Documents in groups of about half a megabyte."""
    batch: list[Item] = []
    size = 0
    for document in documents:
        batch.append(Item(document.text, document.split_key, document.spans))
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_long(text: str, limit: int = LONGEST_TEXT) -> list[str]:
    """``text`` in pieces of at most ``limit`` characters, cut after a line or word if possible."""
    pieces, start = [], 0
    while len(text) - start > limit:
        stop = start + limit
        cut = max(text.rfind("\n", start, stop), text.rfind(" ", start, stop) - 1) + 1
        cut = cut if cut > start else stop
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces


def encode_chats(
    tokenizer: Tokenizer, batch: list[Item], fraction: float, window: int | None
) -> Encoded:
    """Tokenize conversations and mark their tokens. window: tokens of the longest; None: any.

    A token that reaches over the border of two stretches takes the larger of their weights. The
    first token of a conversation is never trained on: nothing of it comes before.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: tuple[list[NDArray[Any]], ...] = ([], [])
    marks: tuple[list[NDArray[np.uint8]], ...] = ([], [])
    documents, sizes, long = [0, 0], [0, 0], 0
    marked = tokenizer.encode_marked([item.text for item in batch])
    for (text, key, spans), found in zip(batch, marked, strict=True):
        assert spans is not None
        if window is not None and len(found.ids) > window:
            long += 1
            continue
        ends, codes = np.array(spans, np.int64).reshape(-1, 2).T
        sides = (found.begins, np.maximum(found.ends - 1, found.begins))
        code = np.maximum(
            *(codes[np.minimum(np.searchsorted(ends, x, "right"), len(ends) - 1)] for x in sides)
        )
        code[0] = STARTS
        side = int(is_heldout(text if key is None else key, fraction))
        tokens[side].append(found.ids.astype(dtype))
        marks[side].append(code.astype(np.uint8))
        documents[side] += 1
        sizes[side] += len(text.encode())
    none = np.zeros(0, dtype), np.zeros(0, np.uint8)
    joined = [np.concatenate([none[0], *parts]) for parts in tokens]
    notes = [np.concatenate([none[1], *parts]) for parts in marks]
    made = [Piece(*one) for one in zip(documents, sizes, joined, notes, strict=True)]
    return Encoded(len(batch), made[0], made[1], long)


def encode_batch(tokenizer: Tokenizer, batch: list[Item], fraction: float) -> Encoded:
    """Tokenize a batch and split off what is held out."""
    cuts = [split_long(item.text) for item in batch]
    arrays = iter(tokenizer.encode_arrays([piece for pieces in cuts for piece in pieces]))
    dtype = token_dtype(tokenizer.vocab_size)
    eos = np.array([tokenizer.eos_id], dtype)
    tokens: tuple[list[NDArray[Any]], ...] = ([], [])
    documents, sizes = [0, 0], [0, 0]
    for (text, key, _), pieces in zip(batch, cuts, strict=True):
        side = int(is_heldout(text if key is None else key, fraction))
        tokens[side].extend(next(arrays).astype(dtype) for _ in pieces)
        tokens[side].append(eos)
        documents[side] += 1
        sizes[side] += len(text.encode())
    joined = [np.concatenate([eos[:0], *parts]) for parts in tokens]
    made = [Piece(*one) for one in zip(documents, sizes, joined, strict=True)]
    return Encoded(len(batch), made[0], made[1])


class Encoder:
    """Tokenizes batches on ``workers`` processes (1: in this one); a context manager.

    ``run`` yields results in the order of the batches, so the number of workers changes nothing
    but the speed, and keeps at most two batches per worker in flight.
    """

    def __init__(self, tokenizer_file: Path, eos_token: str, fraction: float, workers: int) -> None:
        self._setup = (str(tokenizer_file), eos_token, fraction)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        if self._workers > 1:
            self._pool = ProcessPoolExecutor(
                self._workers, get_context("spawn"), _begin_worker, self._setup
            )
        else:
            _load(*self._setup)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Iterable[list[Item]], window: int | None = None) -> Iterator[Encoded]:
        """Encode every batch of ``work``. EnvironmentFault if a worker dies.

        window: tokens of the longest conversation, None: any.
        """
        if self._pool is None:
            yield from (_encode(batch, window) for batch in work)
            return
        flying: deque[Future[Encoded]] = deque()
        try:
            for batch in work:
                flying.append(self._pool.submit(_encode, batch, window))
                if len(flying) >= 2 * self._workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a tokenizing process died, perhaps for lack of memory; run the same command again"
                " with fewer workers (--workers), finished work is kept"
            ) from error


_worker: tuple[Tokenizer, float] | None = None


def _load(tokenizer_file: str, eos_token: str, fraction: float) -> None:
    global _worker
    _worker = load_tokenizer(tokenizer_file, eos_token), fraction


def _begin_worker(tokenizer_file: str, eos_token: str, fraction: float) -> None:
    """In a new process: the parent handles Ctrl-C, and its death, however sudden, ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _load(tokenizer_file, eos_token, fraction)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode(batch: list[Item], window: int | None) -> Encoded:
    assert _worker is not None
    if batch[0].spans is not None:
        return encode_chats(_worker[0], batch, _worker[1], window)
    return encode_batch(_worker[0], batch, _worker[1])
