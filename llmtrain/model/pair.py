"""Two linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.linear import Linear
from llmtrain.model.recompute import forgotten
from llmtrain.ops import Casts, Handoff, activation_cast, fuses_activation, swiglu


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "none": _identity,
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": swiglu,
}


class Factorized(nn.Module):
    """v(activation(u(x))) in the place of a linear layer, whose bias is that of v.

    u.weight: [inner, in], v.weight: [out, inner]. Takes and gives what the layer would: of the two
    factors the one towards the residual stream is whole on every tensor-parallel rank, the other
    is split as the layer was. lean: the result of the activation is computed again in backward.
    """

    def __init__(self, u: Linear, v: Linear, activation: str) -> None:
        super().__init__()
        self.u, self.v, self.activation, self.lean = u, v, activation, False

    def takes_casts(self, x: Tensor) -> bool:
        """See ``Linear.takes_casts``."""
        return self.u.takes_casts(x)

    def wants(self, x: Tensor) -> tuple[bool, bool]:
        """See ``Linear.wants``."""
        return self.u.wants(x)

    def handoff(self, y: Tensor) -> Handoff | None:
        """See ``Linear.handoff``."""
        return self.v.handoff(y)

    def forward(
        self, x: Tensor, casts: Casts | None = None, handoff: Handoff | None = None
    ) -> Tensor:
        """As ``Linear.forward``."""
        lean = self.lean and self.training and not torch.compiler.is_compiling()
        return run_pair(self.u, self.v, self.activation, x, lean, casts, handoff)


HiddenLayer = Linear | Factorized


def run_pair(
    first: HiddenLayer,
    second: HiddenLayer,
    activation: str,
    x: Tensor,
    lean: bool = False,
    casts: Casts | None = None,
    handoff: Handoff | None = None,
) -> Tensor:
    """second(activation(first(x))).

    lean: the result of the activation is computed again in backward. casts: x as ``first`` reads
    it, where its producer has cast it. handoff: see ``Linear.handoff``, of ``second``. Where
    ``second`` computes in FP8 the activation is made with its cast, and in backward with that for
    ``first``; nothing of its result but the FP8 copy is kept then.
    """
    if second.takes_casts(x) and fuses_activation(x, activation):
        between = first.handoff(x)
        inner = first(x, casts, between)
        turned, reads = second.wants(inner)
        active, own = activation_cast(inner, activation, turned, reads, between)
        fused: Tensor = second(active, own, handoff)
        return fused
    inner = first(x, casts)
    again = ACTIVATIONS[activation]
    active, kept = again(inner), inner.detach()
    # ReLU keeps its result and not its input; without an activation there is one tensor.
    lean = lean and activation not in ("relu", "none")
    with forgotten(active, lambda: again(kept)) if lean else nullcontext():
        out: Tensor = second(active, None, handoff)
    return out
