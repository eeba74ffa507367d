"""What factorized layers change in what a block keeps for backward."""

from __future__ import annotations

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model.activations import WHOLE, ActivationSplit
from llmtrain.model.layers import KINDS, cut_dim, inner_width


def factor_activation_bytes(
    cfg: ModelConfig,
    block: int,
    tokens: int,
    dtype: torch.dtype,
    recompute: str = "none",
    split: ActivationSplit = WHOLE,
) -> int:
    """Bytes that block number ``block`` keeps for backward beyond ``block_activation_bytes``, on a
    rank; negative where no gathered input is kept any more. cfg is resolved and has ``factorized``.

    A factorized layer keeps the input and the result of its activation, n i e each for an inner
    width i, of this rank's tokens under sequence parallelism; ReLU the result alone, no activation
    one of them, ``selective`` the input alone. With ``keep_gathered`` the layers that follow a norm
    keep the result gathered, and the norm's result as this rank's tokens.
    """
    assert cfg.factorized is not None
    if recompute == "full":
        return 0
    rows, total = tokens // split.residual, 0
    activation = cfg.factorized.activation
    # What reads its own result in backward, or nothing, keeps no input and is not made again.
    plain = activation in ("relu", "none")
    for kind in KINDS:
        inner = inner_width(cfg, f"blocks.{block}.{kind}")
        if inner is None:
            continue
        before = 0 if plain else rows
        after = rows if plain or recompute != "selective" else 0
        if split.sequence and split.keep_gathered and cut_dim(kind) == 0:
            # v keeps the values of all tokens; the result that ReLU reads is another tensor then.
            before, after = rows if activation == "relu" else before, tokens
            # The result of the norm: whole before, now these tokens or made again.
            again = recompute == "selective" and cfg.norm_placement == "pre"
            total += cfg.d_model * ((0 if again else rows) - tokens)
        total += (before + after) * inner
    return total * dtype.itemsize
