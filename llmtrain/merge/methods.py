"""The rules of merging, on blocks of one tensor at a time.

A rule may first ``measure`` the whole tensor (norms, thresholds); then ``combine`` makes each
block of the result. Work is in float32 (float64 for float64 models). Where a paper leaves
something open the choice is mergekit's (github arcee-ai/mergekit, 0.1.5).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmtrain.merge import blocks as cut
from llmtrain.merge.blocks import Inputs
from llmtrain.merge.formulas import gram, slerp_weights, stock_ratio
from llmtrain.merge.recipe import MergeRecipe

_TINY = 1e-7
_BINS = 1 << 16
T = TypeVar("T")


class Rule:
    """A method of merging. The default measures nothing."""

    def __init__(self, recipe: MergeRecipe) -> None:
        self.recipe = recipe
        self.weights = recipe.weights

    def measure(self, inputs: Inputs) -> Any:
        """What ``combine`` must know of the whole tensor."""

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """The merged block [begin, end)."""
        raise NotImplementedError


class Linear(Rule):
    """sum w_i x_i, divided by sum w_i when normalised (Model soups, 2203.05482)."""

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """Accumulate one model after the other."""
        normalize = self.recipe.normalize is not False
        total = sum(self.weights) if normalize else 1.0
        out: Tensor | None = None
        for reader, weight in zip(inputs.models, self.weights, strict=True):
            block = inputs.read(reader, begin, end)
            out = block.mul_(weight) if out is None else out.add_(block, alpha=weight)
        assert out is not None
        return out.div_(total) if total != 1.0 else out


class WiseFt(Rule):
    """(1 - beta) x + beta x_0 (WiSE-FT, 2109.01903, with alpha = 1 - beta)."""

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """Interpolate; exact at both ends."""
        (block,) = inputs.blocks(begin, end)
        return block.lerp_(inputs.base_block(begin, end), self.recipe.beta)


class Slerp(Rule):
    """Spherical interpolation of each tensor as one vector (Shoemake 1985)."""

    def measure(self, inputs: Inputs) -> tuple[float, float]:
        """Weights of base and model, from the angle between them."""

        def products(begin: int, end: int) -> Tensor:
            return gram([inputs.base_block(begin, end), *inputs.blocks(begin, end)])

        zero = torch.zeros(2, 2, dtype=torch.float64)
        return slerp_weights(sum(inputs.each(products), zero), self.recipe.t)

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """Sum with the measured weights."""
        of_base, of_model = measured
        (block,) = inputs.blocks(begin, end)
        return block.mul_(of_model).add_(inputs.base_block(begin, end), alpha=of_base)


class ModelStock(Rule):
    """t mean(x_i) + (1 - t) x_0 with t from the angles of the tensor (2403.19522)."""

    def measure(self, inputs: Inputs) -> float:
        """The ratio t."""

        def products(begin: int, end: int) -> Tensor:
            return gram(inputs.blocks(begin, end), inputs.base_block(begin, end))

        count = len(inputs.models)
        zero = torch.zeros(count, count, dtype=torch.float64)
        return float(stock_ratio(sum(inputs.each(products), zero)))

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """Interpolate between base and mean."""
        first, *others = inputs.blocks(begin, end)
        for other in others:
            first.add_(other)
        return inputs.base_block(begin, end).lerp_(first.div_(len(inputs.models)), measured)


class TaskArithmetic(Rule):
    """x_0 + lambda sum w_i (x_i - x_0) (2212.04089), the frame of TIES and DARE.

    elects: only changes of the elected sign are summed. normalizes: divide by the weights.
    """

    elects = False
    normalizes = False

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """Weighted sum of the thinned changes."""
        base = inputs.base_block(begin, end)
        changes = torch.empty(len(inputs.models), end - begin, dtype=base.dtype)
        for i, reader in enumerate(inputs.models):
            torch.sub(inputs.read(reader, begin, end), base, out=changes[i])
            self.thin(inputs, i, changes[i], begin, measured)
            changes[i].mul_(self.weights[i])
        wanted = self.recipe.normalize
        normalize = wanted if wanted is not None else self.normalizes
        if self.elects:
            mixed = _elected(changes, self.weights if normalize else None)
        else:
            total = math.fsum(self.weights)
            mixed = changes.sum(0)
            if normalize and abs(total) >= 1e-8:
                mixed.div_(total)
        return base.add_(mixed, alpha=self.recipe.scale)

    def thin(self, inputs: Inputs, i: int, change: Tensor, begin: int, measured: Any) -> None:
        """Drop parts of a block of model ``i``'s change in place."""


class Ties(TaskArithmetic):
    """Trim to the largest changes, elect signs, average what agrees (TIES, 2306.01708)."""

    elects = True
    normalizes = True

    def measure(self, inputs: Inputs) -> list[tuple[float, list[int] | None] | None]:
        """Per model: the least magnitude that stays, and how many of exactly that one do.

        None for a model of which all stays; in place of the counts when all equals stay, else by
        block, so that the first ones stay.
        """
        found: list[tuple[float, list[int] | None] | None] = []
        for i, density in enumerate(self.recipe.densities):
            count = max(1, int(density * inputs.numel)) if density > 0 else 0
            if density >= 1 or inputs.numel == 0:
                found.append(None)
            elif count == 0:
                found.append((float("inf"), None))
            else:
                threshold, left, equals = _largest(partial(_of_magnitudes, inputs, i), count)
                spread = None if left == equals else _spread(inputs, i, threshold, left)
                found.append((threshold, spread))
        return found

    def thin(self, inputs: Inputs, i: int, change: Tensor, begin: int, measured: Any) -> None:
        """Keep what is above the threshold, and of equals the first ones."""
        if measured[i] is None:
            return
        threshold, spread = measured[i]
        if spread is None:
            if threshold == 0:
                return
            limit = torch.tensor(threshold, dtype=change.dtype)
            threshold = float(limit.nextafter(torch.zeros_like(limit)))
        # Bool masks of floats take five times as long.
        kept = torch.nn.functional.hardshrink(change, threshold)
        if spread is not None and (count := spread[begin // cut.BLOCK]):
            first = (change.abs() == threshold).nonzero()[:count]
            kept[first] = change[first]
        change.copy_(kept)


class Dare(TaskArithmetic):
    """Drop changes at random and rescale the rest (DARE, 2311.03099); signs may be elected.

    What is dropped depends on seed, tensor, model and place only.
    """

    def __init__(self, recipe: MergeRecipe) -> None:
        super().__init__(recipe)
        self.elects = recipe.sign_election

    def measure(self, inputs: Inputs) -> list[float]:
        """Factor on what stays of each model's change."""
        factors = []
        for i, density in enumerate(self.recipe.densities):
            factor = 1.0
            if self.recipe.rescale == "density" and 0 < density < 1:
                factor = 1.0 / density
            elif self.recipe.rescale == "l1" and density < 1:
                factor = self._norm_factor(inputs, i, density)
            factors.append(factor)
        return factors

    def _norm_factor(self, inputs: Inputs, i: int, density: float) -> float:

        def norms(begin: int, end: int) -> Tensor:
            size = _magnitude(inputs, i, begin, end)
            whole = size.sum(dtype=torch.float64)
            size.mul_(self.mask(inputs.name, i, begin, len(size), density))
            return torch.stack([whole, size.sum(dtype=torch.float64)])

        zero = torch.zeros(2, dtype=torch.float64)
        whole, kept = sum(inputs.each(norms), zero).tolist()
        return 1.0 if whole < _TINY or kept < _TINY else whole / kept

    def thin(self, inputs: Inputs, i: int, change: Tensor, begin: int, measured: Any) -> None:
        """Apply mask and factor."""
        density = self.recipe.densities[i]
        if density < 1:
            change.mul_(self.mask(inputs.name, i, begin, len(change), density)).mul_(measured[i])

    def mask(self, name: str, model: int, begin: int, length: int, density: float) -> Tensor:
        """Which elements of the block at ``begin`` stay: bool [length]."""
        text = f"{self.recipe.seed} {name} {model} {begin}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        return torch.rand(length, generator=torch.Generator().manual_seed(seed)) < density


class Fisher(Rule):
    """sum w_i F_i x_i / sum w_i F_i with diagonal Fisher information (2111.09832, eq. 3)."""

    def combine(self, inputs: Inputs, begin: int, end: int, measured: Any) -> Tensor:
        """The mean weighted element by element."""
        total = torch.zeros(end - begin, dtype=inputs.dtype)
        out = torch.zeros_like(total)
        for model, fisher, weight in zip(inputs.models, inputs.fishers, self.weights, strict=True):
            block = inputs.read(model, begin, end)
            importance = inputs.read(fisher, begin, end).clamp_(min=self.recipe.fisher_floor)
            importance.mul_(weight)
            total.add_(importance)
            out.add_(importance.mul_(block))
        return out.div_(total)


RULES: dict[str, type[Rule]] = {
    "linear": Linear,
    "soup": Linear,
    "slerp": Slerp,
    "wise-ft": WiseFt,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "model-stock": ModelStock,
    "fisher": Fisher,
}


def _elected(changes: Tensor, weights: list[float] | None) -> Tensor:
    """The sum of those of ``changes`` [models, n] that have the sign of the sum of all, at each
    place; divided by the sum of their ``weights`` where that is not zero. Uses changes up.

    In floats alone, of which bool masks would take several times as long.
    """
    total = changes.sum(0)
    sign = torch.ones_like(total).copysign_(total)
    agreed = changes.mul_(sign).clamp_(min=0)
    mixed = agreed.sum(0).mul_(sign)
    if weights is None:
        return mixed
    divisor = torch.tensor(weights, dtype=changes.dtype) @ agreed.sign_()
    # One instead of zero.
    return mixed.div_(divisor.add_(divisor.abs().sign_().neg_().add_(1)))


def _magnitude(inputs: Inputs, i: int, begin: int, end: int) -> Tensor:
    """|x_i - x_0| of a block."""
    change = inputs.read(inputs.models[i], begin, end)
    return change.sub_(inputs.base_block(begin, end)).abs_()


def _of_magnitudes(inputs: Inputs, i: int, function: Callable[[Tensor], T]) -> Iterable[T]:
    """``function`` of |x_i - x_0| of every block."""
    return inputs.each(lambda begin, end: function(_magnitude(inputs, i, begin, end)))


def _spread(inputs: Inputs, i: int, threshold: float, left: int) -> list[int]:
    """How many of the values that equal ``threshold`` stay in each block: the first ``left``."""
    found = []
    for count in _of_magnitudes(inputs, i, lambda size: int((size == threshold).sum())):
        found.append(min(left, count))
        left -= found[-1]
    return found


def _largest(
    each: Callable[[Callable[[Tensor], Tensor]], Iterable[Tensor]], count: int
) -> tuple[float, int, int]:
    """The ``count``-th largest of many non-negative values, and its equals.

    each: applies a function to every block of the values. Returns the value, how many of its
    equals are among the largest, and how many there are. Radix selection: the bits of
    non-negative floats are ordered as the floats, so the value is found 16 bits at a time by
    counting, with one pass over the values for each and no memory for them.
    """
    prefix, left, width, equals = 0, count, 32, 0
    position = 0
    while 16 * position < width:

        def digits(block: Tensor, position: int = position, prefix: int = prefix) -> Tensor:
            bits_of = 8 * block.itemsize
            shift = bits_of - 16 * (position + 1)
            bits = block.view(torch.int32 if bits_of == 32 else torch.int64)
            if position:
                # numpy takes a few of many in a quarter of torch's time.
                numbers = bits.numpy()
                bits = torch.from_numpy(numbers[numbers >> (shift + 16) == prefix])
            counts = torch.bincount((bits >> shift) & (_BINS - 1), minlength=_BINS + 1)
            counts[_BINS] = bits_of
            return counts

        totals = torch.zeros(_BINS + 1, dtype=torch.int64)
        for counts in each(digits):
            width = int(counts[_BINS])
            totals += counts
        counts = totals[:_BINS]
        from_top = counts.flip(0).cumsum(0)
        digit = _BINS - 1 - int(torch.searchsorted(from_top, left))
        equals = int(counts[digit])
        left -= int(from_top[_BINS - 1 - digit]) - equals
        prefix = (prefix << 16) | digit
        position += 1
    raw = torch.tensor([prefix], dtype=torch.int32 if width == 32 else torch.int64)
    value = raw.view(torch.float32 if width == 32 else torch.float64)
    return float(value), left, equals
