"""Rotary settings of config.json: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.rope import RopeScalingConfig
from llmtrain.config.schema import ModelConfig

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def from_rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a model section.

    Raises ValueError for a kind of scaling that does not exist here.
    """
    # transformers 5 writes all into rope_parameters, earlier versions into two keys.
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = float(given.get("rope_theta", c["rope_theta"]))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        scaling = RopeScalingConfig(kind="linear", factor=float(given["factor"]))
    elif kind == "llama3":
        factor, low, high, original = (given[key] for key in _LLAMA3)
        scaling = RopeScalingConfig("llama3", float(factor), float(low), float(high), int(original))
    else:
        raise ValueError(f"rope_type {kind!r} does not exist here; there are linear and llama3")
    return {"rope_theta": theta, "rope_scaling": scaling}


def to_rope(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that every version of transformers reads."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_theta": cfg.rope_theta, "rope_scaling": None}
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found["low_freq_factor"] = scaling.low_freq_factor
        found["high_freq_factor"] = scaling.high_freq_factor
        found["original_max_position_embeddings"] = scaling.original_max_position
    return {"rope_theta": cfg.rope_theta, "rope_scaling": found}
