"""Rules of ``model.scaling``: what a parametrisation and its residual stream need."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.scaling import ScalingConfig, residual_kind
from llmtrain.config.schema import ModelConfig, RunConfig

_SECTION = "model.scaling"
_DEFAULTS = ScalingConfig.__dataclass_fields__


def check_scaling(cfg: RunConfig, faults: Collector) -> None:
    """Add a fault for every key of the model that does not go with its scaling."""
    scaling, kind = cfg.model.scaling, cfg.model.scaling.parametrization
    named = f"{_SECTION}.parametrization"
    _check_residual(cfg.model, faults)
    if kind == "standard" and scaling.base_width != _DEFAULTS["base_width"].default:
        faults.add(f"{_SECTION}.base_width", "is read with mup and mus only; remove it", named)
    if kind == "mus":
        if cfg.model.init_std != ModelConfig.__dataclass_fields__["init_std"].default:
            faults.add(
                "model.init_std",
                "is not read with parametrization: mus, whose weights begin with a standard "
                "deviation of 1; remove it",
                named,
            )
        if cfg.model.position == "learned":
            faults.add(
                "model.position",
                "learned adds a second embedding, with which the residual stream does not begin "
                "with unit variance (parametrization: mus); use rope or none",
                named,
            )
    if scaling.attention == "sqrt" and cfg.parallel.context > 1:
        faults.add(
            f"{_SECTION}.attention",
            "sqrt does not go together with parallel.context > 1; use softmax, or context: 1",
            "parallel.context",
        )


def _check_residual(model: ModelConfig, faults: Collector) -> None:
    scaling = model.scaling
    kind = residual_kind(scaling)
    depends = (f"{_SECTION}.residual", f"{_SECTION}.parametrization")
    if kind != "sum" and model.norm_placement != "post_branch":
        given = "the default of mus" if scaling.residual is None else "as set"
        faults.add(
            "model.norm_placement",
            f"{model.norm_placement} leaves branches of any size, and {_SECTION}.residual: {kind} "
            f"({given}) weighs branches of unit variance; use post_branch, or residual: sum",
            *depends,
        )
    keys = (f"{_SECTION}.tau", f"{_SECTION}.tau_by_depth")
    if kind != "fixed":
        if scaling.tau is not None or scaling.tau_by_depth:
            which = keys[scaling.tau is None]
            faults.add(which, f"is read with residual: fixed, not {kind}; remove it", *depends)
    elif scaling.tau is not None and scaling.tau_by_depth:
        faults.add(keys[0], "and tau_by_depth exclude each other; remove one", keys[1])
    elif scaling.tau is None and not scaling.tau_by_depth:
        faults.add(
            keys[0],
            "is missing: residual: fixed needs it; sweep it at the depth of the model (0.4 suits 4 "
            "layers), or set tau_by_depth: true",
            *depends,
            keys[1],
        )
