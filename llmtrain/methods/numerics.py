"""How the tensors of hidden linear layers lie in the range of FP8 (section ``numerics``).

On a schedule, for one step, each layer's input, weight and gradient of the output are measured:
the share that a cast to FP8 with static scales would flush to zero (underflow) and clip
(overflow), the root mean square, the largest magnitude, and a histogram of the binary exponents.
µnit Scaling (Narayan et al. 2025, 2502.05967, section 3.3) counts underflow that way: up to 30%
of GELU's outputs, 7% of SiLU's, 0.04% of ReLU's. Nothing about the step changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.number_formats import NumericsConfig
from llmtrain.linear import Linear
from llmtrain.model import gradient_scale, hidden_layers
from llmtrain.ops import E4M3, E5M2, FP8_MAX
from llmtrain.ops.fp8 import FP8_MIN
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from llmtrain.data.batch import Batch
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer

# Binary exponents of the histogram; what lies beyond is in the first or last bin.
LOWEST, HIGHEST = -40, 20
BINS = HIGHEST - LOWEST + 1


def measure(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Sums over ``x`` [...], float64 [5 + BINS]: elements, those that casting ``factor`` x to
    ``dtype`` makes zero though they are not, those it clips, squares of x, max |x|; then how
    many numbers have each binary exponent. NaN and infinities count as clipped only."""
    magnitude = x.detach().abs().double().flatten()
    cast = magnitude * factor
    finite = magnitude.isfinite()
    # A tie goes to the even neighbour, which is zero.
    under = (cast <= FP8_MIN[dtype] / 2) & (magnitude > 0)
    over = ~(cast <= FP8_MAX[dtype])
    kept = torch.where(finite, magnitude, 0.0)
    exponent = torch.frexp(kept[kept > 0]).exponent.long() - 1 - LOWEST
    counts = torch.bincount(exponent.clamp(0, BINS - 1), minlength=BINS).double()
    largest = kept.max() if len(kept) else kept.new_zeros(())
    count = kept.new_tensor(float(len(kept)))
    sums = torch.stack((count, under.sum(), over.sum(), kept.square().sum(), largest))
    return torch.cat((sums, counts)).cpu()


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The sums of two parts of a tensor together."""
    out = a + b
    out[4] = torch.maximum(a[4], b[4])
    return out


def summary(sums: Tensor) -> dict[str, Any]:
    """What is recorded of a tensor: underflow and overflow as shares, rms, max; histogram as
    [lowest exponent that occurs, shares from there on]."""
    count = max(float(sums[0]), 1.0)
    shares = sums[5:] / count
    filled = shares.nonzero().flatten().tolist()
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return {
        "underflow": float(sums[1]) / count,
        "overflow": float(sums[2]) / count,
        "rms": (float(sums[3]) / count) ** 0.5,
        "max": float(sums[4]),
        "exponents": [first + LOWEST, *(round(s, 7) for s in shares[first:last].tolist())],
    }


class Numerics(Hook):
    """Measures during every step that is due, and records it on the main rank."""

    def __init__(self, section: NumericsConfig) -> None:
        self._section = section
        self._every = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def on_run_start(self, trainer: Trainer) -> None:
        times = trainer.clockwork
        self._every = max(self._section.every.steps(times.tokens_per_step, times.total), 1)

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        step = trainer.step_done + 1
        if step % self._every and step != 1:
            return
        factor = 1.0
        if trainer.cfg.quantization is not None:
            factor = gradient_scale(trainer.cfg, trainer.module.model_cfg)
        for name, layer in hidden_layers(trainer.module.model):
            self._watch(name, layer, factor)

    def _watch(self, name: str, layer: Linear, factor: float) -> None:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(name, "input", measure(args[0], E4M3))
            weight = layer.parts()[0] if layer.compact is None else layer.dense_weight()
            self._add(name, "weight", measure(weight, E4M3))

        def gradient(grad: Tensor) -> None:
            self._add(name, "gradient", measure(grad, E5M2, factor))

        def after(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(gradient)  # type: ignore[no-untyped-call]

        self._handles.append(layer.register_forward_pre_hook(before))
        self._handles.append(layer.register_forward_hook(after))

    def _add(self, name: str, role: str, sums: Tensor) -> None:
        old = self._sums.get((name, role))
        self._sums[name, role] = sums if old is None else merge(old, sums)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        sums, self._sums = _of_all_ranks(self._sums, trainer.world.cpu_group), {}
        tensors: dict[str, dict[str, Any]] = {}
        for (name, role), value in sums.items():
            tensors.setdefault(name, {})[role] = summary(value)
        trainer.recorder.numerics(result.step, tensors)


def _of_all_ranks(
    own: dict[tuple[str, str], Tensor], group: dist.ProcessGroup | None
) -> dict[tuple[str, str], Tensor]:
    """The parts of every rank together. Ranks that hold the same tensor count it twice, which
    changes no share."""
    if group is None:
        return own
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    total: dict[tuple[str, str], Tensor] = {}
    for part in everyone:
        for key, sums in part.items():
            total[key] = merge(total[key], sums) if key in total else sums
    return total
