"""What adapters, and the frozen weights beside them, change in what a block keeps for backward."""

from __future__ import annotations

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model.activations import WHOLE, ActivationSplit, block_activation_bytes
from llmtrain.model.adapters import PARTS, adapted_parts, is_directed
from llmtrain.model.layers import cut_dim, whole_shape, widths


def adapter_activation_bytes(
    cfg: ModelConfig,
    block: int,
    tokens: int,
    dtype: torch.dtype,
    recompute: str = "none",
    split: ActivationSplit = WHOLE,
) -> int:
    """Bytes that block number ``block`` keeps for backward beyond ``block_activation_bytes``, on a
    rank; negative where frozen weights leave more out than adapters add. cfg has adapters.

    With p matrices in a layer and r values of each, an adapter keeps its n p r values between A and
    B, split over the ranks of sequence parallelism; of a fused layer B spread over its matrices,
    out p r numbers, and which rows are whose; with DoRA the layer's result, n out, and two float32
    and a byte a row. A frozen layer without an adapter does not keep its input: the result of a
    norm, of the activation, or attention's copy of its own. Blocks below the first adapted one keep
    nothing. ``recompute: full`` makes all of it again.
    """
    section = cfg.adapters
    assert section is not None
    whole = block_activation_bytes(cfg, tokens, dtype, recompute, split)
    adapted = [
        bool(adapted_parts(cfg, f"blocks.{i}.{kind}")) for i in range(block + 1) for kind in PARTS
    ]
    if section.freeze and not any(adapted):
        return -whole
    if recompute == "full":
        return 0
    rows = tokens // split.residual
    total = 0
    for kind in PARTS:
        parts = adapted_parts(cfg, f"blocks.{block}.{kind}")
        values = len(parts) * max((part.rank for part in parts), default=0)
        total += rows * values * dtype.itemsize
        column = cut_dim(kind) == 0
        out = whole_shape(cfg, kind)[0] // (split.tensor if column else 1)
        fused = kind == "attention.qkv" or (kind == "mlp.up" and cfg.activation == "swiglu")
        if parts and fused:
            same = len({part.scale for part in parts}) == 1
            total += out * (values * dtype.itemsize + len(parts) * (1 if same else 4))
        if parts and is_directed(section):
            tall = tokens if column else rows
            total += out * (tall * dtype.itemsize + 2 * 4 + 1)
        if section.freeze and not parts:
            total -= _input_bytes(cfg, kind, tokens, dtype, recompute, split)
    return total


def _input_bytes(
    cfg: ModelConfig,
    kind: str,
    tokens: int,
    dtype: torch.dtype,
    recompute: str,
    split: ActivationSplit,
) -> int:
    """Bytes of a layer's input that ``block_activation_bytes`` counts and nothing else keeps."""
    q, _, ff = (width // split.tensor for width in widths(cfg))
    item = dtype.itemsize
    if cut_dim(kind) == 0:
        # After the branch, norms read what the stream is: it is theirs.
        kept = recompute == "none" and cfg.norm_placement == "pre"
        rows = tokens if split.sequence and split.keep_gathered else tokens // split.residual
        return rows * cfg.d_model * item if kept else 0
    if kind == "attention.out":
        copied = (cfg.position == "rope" and not split.by_tokens) or split.context > 1
        return tokens * q * item if copied else 0
    # ReLU reads its own result in backward.
    kept = recompute == "none" and cfg.activation != "relu"
    return tokens * ff * item if kept else 0
