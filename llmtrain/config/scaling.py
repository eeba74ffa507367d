"""How a model's weights, products and rates depend on its width and depth."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class ScalingConfig:
    """Parametrisation over width and depth: standard, muP, unit scaling (muS)."""

    parametrization: str = key(
        "standard",
        "init, multipliers and rates by role and width: standard: as everywhere; mup: muP; "
        "mus: unit scaling, weights of std 1",
        choices=("standard", "mup", "mus"),
    )
    base_width: int = key(
        256, "mup, mus: d_model of the model that optim.lr was tuned for; no factor there", ge=1
    )
    residual: str | None = key(
        None,
        "sum: x + f; fixed: sqrt(1-tau) x + sqrt(tau) f; running_mean: mean of all branches so "
        "far times the root of their number; null: fixed with mus, else sum",
        choices=("sum", "fixed", "running_mean", None),
    )
    tau: float | None = key(None, "residual fixed: share of a branch in the variance", gt=0, lt=1)
    tau_by_depth: bool = key(
        False,
        "residual fixed: tau = 0.4 (n_layers / 4)^-0.43, our interpolation between two values of "
        "the paper, which gives no formula",
    )
    attention: str = key(
        "softmax",
        "weights of the values; sqrt: the root of the softmax (to study variances; slow)",
        choices=("softmax", "sqrt"),
    )


def residual_kind(scaling: ScalingConfig) -> str:
    """sum, fixed or running_mean, the default filled in."""
    if scaling.residual is not None:
        return scaling.residual
    return "fixed" if scaling.parametrization == "mus" else "sum"
