"""Parametrisations: how initialisation, multipliers and rates depend on role and width.

Each is one table. Sources: muP is Yang et al. 2022 (2203.03466), table 8; muS is Narayan et al.
2025 (2502.05967), table 2, with res-post-norm and fixed residual of sections 2.2 and 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmtrain.config.scaling import ScalingConfig, residual_kind
from llmtrain.config.schema import ROLES, ModelConfig, OptimConfig
from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """Powers for the parameters of a role: of ``init`` and ``lr`` in r = d_model / base_width, of
    ``multiplier`` and ``fan_in`` in r and in the layer's own inputs."""

    init: float = 0.0
    multiplier: float = 0.0
    fan_in: float = 0.0
    lr: float = 0.0


# Weights of embedding, hidden and head begin with the standard deviation model.init_std r^init,
# or with muS 1; norms with 1, biases with 0. A product's forward multiplier is
# r^multiplier in^fan_in, and backward multiplies by the same. The peak rate is optim.lr r^lr.
# Weight decay per step at the peak rate is the same at any width in all three.
TABLES: Mapping[str, Mapping[str, Row]] = {
    "standard": dict.fromkeys(ROLES, Row()),
    "mup": {
        "embedding": Row(),
        "hidden": Row(init=-0.5, lr=-1.0),
        "norm": Row(),
        "head": Row(multiplier=-1.0),
        "bias": Row(),
        "adapter": Row(),
    },
    "mus": {
        "embedding": Row(),
        "hidden": Row(fan_in=-0.5, lr=-0.5),
        "norm": Row(),
        "head": Row(fan_in=-1.0),
        "bias": Row(),
        "adapter": Row(),
    },
}


def _width_ratio(cfg: ModelConfig) -> float:
    return cfg.d_model / cfg.scaling.base_width


def _row(cfg: ModelConfig, role: str) -> Row:
    return TABLES[cfg.scaling.parametrization][role]


def init_std(cfg: ModelConfig, role: str, *, into_stream: bool = False) -> float:
    """Standard deviation of an initial weight.

    into_stream: of a projection into the residual stream, which ``init_depth_scale`` divides by
    sqrt(2 n_layers) (GPT-2), except with muS.
    """
    if cfg.scaling.parametrization == "mus":
        return 1.0
    std = cfg.init_std * math.pow(_width_ratio(cfg), _row(cfg, role).init)
    return std / math.sqrt(2 * cfg.n_layers) if into_stream and cfg.init_depth_scale else std


def multiplier(cfg: ModelConfig, role: str, fan_in: int) -> float:
    """Constant that multiplies the products of a linear layer with ``fan_in`` inputs (of the
    whole layer, however it is split over ranks)."""
    row = _row(cfg, role)
    return math.pow(_width_ratio(cfg), row.multiplier) * math.pow(fan_in, row.fan_in)


def rate_factors(cfg: ModelConfig) -> dict[str, float]:
    """Role -> factor on the learning rate."""
    return {role: math.pow(_width_ratio(cfg), _row(cfg, role).lr) for role in ROLES}


def decay_factor(rate: float, optim: OptimConfig) -> float:
    """Factor on the weight decay where the learning rate has the factor ``rate``.

    The decay of a weight per step is to stay the same at any width (2502.05967, section 3.2).
    ``decoupled: fully`` does so by itself; ``lr`` multiplies the decay by the rate, factor and
    all, which is taken out again.
    """
    return 1.0 if optim.decoupled == "fully" else 1.0 / rate


def tau_by_depth(n_layers: int) -> float:
    """A share tau for residual: fixed, by depth.

    OUR interpolation, not the paper's: a power law through its tau 0.4 for 4 layers and 0.1 for
    what we take to be 100 layers (2502.05967, figures 5 and 9). The paper sweeps tau.
    """
    return 0.4 * math.pow(n_layers / 4, -0.43)


def resolve_scaling(cfg: ModelConfig) -> ScalingConfig:
    """``cfg.scaling`` with its tau filled in. Raises ConfigError for a missing one."""
    scaling = cfg.scaling
    if residual_kind(scaling) != "fixed":
        return scaling
    tau = tau_by_depth(cfg.n_layers) if scaling.tau_by_depth else scaling.tau
    if tau is None:
        raise ConfigError("model.scaling.tau: residual: fixed needs it, or tau_by_depth: true")
    return replace(scaling, tau=tau, tau_by_depth=False)


def residual_weights(cfg: ModelConfig, branch: int) -> tuple[float, float]:
    """(a, b) of x <- a x + b f(x) for residual branch number ``branch`` of the whole model.

    Branches count from 0, two to a block. fixed: (sqrt(1 - tau), sqrt(tau)). running_mean
    (2502.05967, section 2.3): with l = branch + 1, (sqrt(l / (l + 1)), sqrt(1 / (l + 1))).
    In both a^2 + b^2 = 1, so that branches of unit variance keep a stream of unit variance.
    """
    tau, kind = cfg.scaling.tau, residual_kind(cfg.scaling)
    if kind == "fixed":
        assert tau is not None
        return math.sqrt(1 - tau), math.sqrt(tau)
    if kind == "running_mean":
        count = branch + 1
        return math.sqrt(count / (count + 1)), math.sqrt(1 / (count + 1))
    return 1.0, 1.0


def scaling_table(cfg: ModelConfig, optim: OptimConfig) -> list[tuple[str, ...]]:
    """Rows (role, initial std, multiplier, factor on the rate, on the decay), with a header."""
    rows: list[tuple[str, ...]] = [("role", "init std", "multiplier", "lr factor", "decay factor")]
    constant = {"norm": "1 (constant)", "bias": "0 (constant)"}
    products = {"hidden": (cfg.d_model, cfg.d_ff), "head": (cfg.d_model,)}
    for role, rate in rate_factors(cfg).items():
        if role == "adapter":
            continue
        widths = dict.fromkeys(w for w in products.get(role, ()) if w is not None)
        factors = [f"{multiplier(cfg, role, w):.4g} (of {w})" for w in widths]
        std = constant.get(role) or f"{init_std(cfg, role):.4g}"
        decay = f"{decay_factor(rate, optim):.4g}"
        rows.append((role, std, ", ".join(factors) or "1", f"{rate:.4g}", decay))
    return rows
