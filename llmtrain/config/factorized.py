"""Hidden layers as two factors."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class FactorizedConfig:
    """Hidden layers as two factors, v(activation(u(x))), whose masks (``sparsity``) make room for a
    wider inside: Sparse Factorized of Sparse-IFT (Thangarasa et al. 2023, 2303.11525)."""

    layers: list[str] = key(
        lambda: ["*"],
        "patterns of layer names, such as *.mlp.* or blocks.0.*; each becomes .u and .v",
    )
    density_u: float = key(
        0.5,
        "kept share of u for which the inner width is chosen: inputs outputs / (density_u inputs + "
        "density_v outputs), as many kept weights as the layer would have",
        gt=0,
        le=1,
    )
    density_v: float = key(0.5, "the same of v; the masks themselves are sparsity's", gt=0, le=1)
    activation: str = key(
        "gelu",
        "between the factors; none: nothing",
        choices=("gelu", "gelu_tanh", "relu", "silu", "none"),
    )
    multiple_of: int = key(16, "the inner width is rounded up to a multiple of this", ge=1)
