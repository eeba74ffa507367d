"""Choosing what a mask keeps: at random by global index, or the largest scores.

Random masks depend on (seed, name, shape, index) only: every rank draws its own rows and gets
what a single process would have there. The density of blocks is exact, in every layer and
nearly in every row: row r of R keeps floor((r+1) K / R) - floor(r K / R) of K in all, so that the
work of rows is balanced.
"""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

from llmtrain.ops.masking import transposable_mask
from llmtrain.sparsity.granularity import LARGEST_TILE, Granularity

# Keys drawn at a time: bounds the memory, and fixes the stream.
CHUNK = 1 << 20


def _keys(seed: int, name: str, width: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of uniform uint64 keys, ``width`` each, in chunks of whole rows."""
    rows = max(1, CHUNK // width)
    out = np.empty((stop - start, width), dtype=np.uint64)
    for chunk in range(start // rows, -(-stop // rows)):
        label = f"mask/{seed}/{name}/{chunk}".encode()
        key = int.from_bytes(hashlib.blake2b(label, digest_size=16).digest(), "little")
        first = chunk * rows
        low, high = max(start, first), min(stop, first + rows)
        count = high - first  # what comes after it in the stream is not needed
        values = np.random.Philox(key=key).random_raw(count * width).reshape(count, width)
        out[low - start : high - start] = values[low - first : high - first]
    return out


def random_keys(label: tuple[int, str], grid: tuple[int, int]) -> Tensor:
    """Uniform float64 scores in [0, 1) by index, for a choice at random. label: seed and name."""
    keys = _keys(*label, grid[1], 0, grid[0]) >> 11
    return torch.from_numpy(keys.astype(np.float64) / (1 << 53))


def random_kept(
    granularity: Granularity,
    density: float,
    shape: tuple[int, int],
    label: tuple[int, str],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """A random mask of a matrix ``shape``: bool, one value per block.

    label: seed and name of the matrix. rows: [start, stop) of its rows of blocks, whole units;
    None: all.
    """
    down, across = granularity.grid(shape)
    start, stop = (0, down) if rows is None else rows
    if granularity.m:
        return _random_nm(granularity, (down, across), label, (start, stop))
    total = round(density * down * across)
    keys = _keys(*label, across, start, stop)
    index = np.arange(start, stop + 1, dtype=np.int64) * total // down
    counts = np.diff(index)
    kept = np.zeros((stop - start, across), dtype=bool)
    for count in np.unique(counts):
        own = counts == count
        if count == across:
            kept[own] = True
        elif count:
            # A tie of 64-bit keys, once in 10^13 masks, would keep one block more.
            limit = np.partition(keys[own], count - 1, axis=1)[:, count - 1 : count]
            kept[own] = keys[own] <= limit
    return torch.from_numpy(kept)


def _random_nm(
    granularity: Granularity,
    grid: tuple[int, int],
    label: tuple[int, str],
    rows: tuple[int, int],
) -> Tensor:
    n, m, across = granularity.n, granularity.m, grid[1]
    start, stop = rows
    if not granularity.both:
        keys = _keys(*label, across, start, stop).reshape(stop - start, across // m, m)
        ranks = keys.argsort(-1).argsort(-1)
        return torch.from_numpy((ranks < n).reshape(stop - start, across))
    first, last = start // m, stop // m
    if m <= LARGEST_TILE:
        patterns = tile_patterns(n, m)
        keys = _keys(*label, across // m, first, last)
        tiles = patterns[torch.from_numpy((keys % len(patterns)).astype(np.int64))]
    else:
        # Rows and columns of a circulant tile, shuffled: not every pattern is as likely.
        pairs = _keys(*label, across // m * 2 * m, first, last).reshape(-1, across // m, 2, m)
        down, right = (torch.from_numpy(pairs[:, :, i].argsort(-1)) for i in (0, 1))
        tiles = (right[..., None, :] - down[..., :, None]) % m < n
    return tiles.transpose(1, 2).reshape(stop - start, across)


@cache
def tile_patterns(n: int, m: int) -> Tensor:
    """All m x m tiles with n kept in every row and column, bool [patterns, m, m]; 90 for 2:4."""
    choices = [[j in chosen for j in range(m)] for chosen in combinations(range(m), n)]
    tiles = torch.tensor(list(product(choices, repeat=m)))
    return tiles[(tiles.sum(1) == n).all(1)]


def prune_again(
    granularity: Granularity, kept: Tensor, label: tuple[int, str], top: int, place: tuple[int, int]
) -> Tensor:
    """``kept`` of an N:M mask pruned to N of every M outputs as well (SLoPe's double pruning).

    What goes is drawn at random among the kept. kept: bool [rows, columns] of a part that begins
    at row ``top``, a multiple of M; place: width of the whole mask and where the part's columns
    begin. A group with at most N kept loses nothing.
    """
    n, m = granularity.n, granularity.m
    rows, columns = kept.shape
    seed, name = label
    keys = _keys(seed, f"{name}/back", place[0], top, top + rows)
    # Of 53 bits, so that none is lost in a double, and what is pruned comes last.
    drawn = torch.from_numpy((keys[:, place[1] : place[1] + columns] >> 11).astype(np.float64))
    drawn[~kept.cpu()] = torch.inf
    ranks = drawn.view(rows // m, m, columns).argsort(1).argsort(1)
    return kept & (ranks < n).view(rows, columns).to(kept.device)


def block_scores(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums of |values| over the blocks of a matrix, cut-off blocks over what is there; float32."""
    return block_sums(values.detach().abs(), block)


def block_sums(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over the blocks of a matrix, float32, one a block."""
    rows, columns = values.shape
    values = values.detach().float()
    high, wide = block
    if block == (1, 1):
        return values
    padded = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
    return padded.view(-1, high, padded.shape[1] // wide, wide).sum((1, 3))


def best_kept(granularity: Granularity, scores: Tensor, density: float) -> Tensor:
    """The mask of the largest ``scores`` (one per block, ``block_scores``), bool like them.

    N:M keeps the N largest of each group; transposable N:M the pattern of the largest sum of each
    tile. Of equal scores the first ones are kept. Raises ValueError for a transposable tile
    beyond ``LARGEST_TILE``.
    """
    n, m = granularity.n, granularity.m
    if not m:
        return largest(scores, round(density * scores.numel()))
    if density == 1.0:
        return torch.ones_like(scores, dtype=torch.bool)
    rows, columns = scores.shape
    if not granularity.both:
        groups = scores.view(rows, columns // m, m)
        ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (ranks < n).view(rows, columns)
    if m > LARGEST_TILE:
        raise ValueError(f"{granularity.text}: tiles are searched up to {LARGEST_TILE} a side")
    if scores.is_cuda and (n, m) == (2, 4):
        return transposable_mask(scores)  # without the sums of all patterns in memory
    patterns = tile_patterns(n, m).to(scores.device)
    tiles = scores.view(rows // m, m, columns // m, m).transpose(1, 2)
    sums = tiles.flatten(2) @ patterns.flatten(1).to(scores.dtype).t()
    return patterns[sums.argmax(-1)].transpose(1, 2).reshape(rows, columns)


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool like ``scores``: the ``count`` largest; of equal ones the first."""
    flat = scores.flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(dim=0, descending=True, stable=True)[:count]] = True
    return kept.view_as(scores)
