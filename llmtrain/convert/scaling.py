"""Folding of a parametrisation's multipliers into the weights, for architectures that know none."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.config.scaling import ScalingConfig, residual_kind
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import CheckpointError
from llmtrain.model import is_hidden_layer, layer_shape, multiplier


def folded(cfg: ModelConfig) -> ModelConfig:
    """The model with standard parametrisation that computes the same, with weights multiplied by
    ``fold_factor``. Raises CheckpointError saying what of ``model.scaling`` no weights can hold."""
    scaling = cfg.scaling
    reasons = []
    if scaling.attention != "softmax":
        reasons.append(f"attention: {scaling.attention}")
    if residual_kind(scaling) != "sum":
        reasons.append(f"residual: {residual_kind(scaling)}")
    if cfg.tie_embeddings and fold_factor(cfg, "head.projection.weight") != 1.0:
        reasons.append("a multiplier of the head alone, whose weight is the embedding's")
    if reasons:
        raise CheckpointError(
            f"no architecture of transformers computes this model: model.scaling has "
            f"{' and '.join(reasons)}, which no weights can express; use the checkpoint "
            "with llmtrain eval and generate, or write it with llmtrain checkpoint export"
        )
    return replace(cfg, scaling=ScalingConfig())


def fold_factor(cfg: ModelConfig, name: str) -> float:
    """What the weight ``name`` of a resolved model is multiplied by when it is folded."""
    if name == "head.projection.weight":
        return multiplier(cfg, "head", cfg.d_model)
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight" and is_hidden_layer(layer):
        return multiplier(cfg, "hidden", layer_shape(cfg, layer)[1])
    return 1.0
