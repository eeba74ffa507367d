"""Closed forms of the activations that a forward pass keeps for backward.

They follow Korthikanti et al. 2022 (2205.05198, section 4). Theirs for a GPT layer in bf16 with
tensor and sequence parallelism and without the attention scores is 34 s b h / t: two norms' inputs
4, the inputs of the products 2 + 2 + 2 + 8, q, k, v 6, the activation's input 8, two dropout masks
2. There is no dropout here, so 32 s b h / t remain for that shape, which is ``recompute: none``
(attention never keeps its scores), and float32 statistics of norms and softmax beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model.layers import widths

STATISTIC = 4  # bytes of a float32


@dataclass(frozen=True)
class ActivationSplit:
    """How ranks share the activations of a micro-batch.

    tensor: tensor-parallel degree; sequence, keep_gathered: as in ``parallel``. context:
    context-parallel degree; ring: its method, which keeps no keys and values of other ranks.
    by_tokens: attention writes its result by tokens, as the compiled one of the CPU does.
    """

    tensor: int = 1
    sequence: bool = False
    keep_gathered: bool = False
    context: int = 1
    ring: bool = False
    by_tokens: bool = False

    @property
    def residual(self) -> int:
        """Over how many ranks the residual stream's tokens are split."""
        return self.tensor if self.sequence else 1


WHOLE = ActivationSplit()


def block_activation_bytes(
    cfg: ModelConfig,
    tokens: int,
    dtype: torch.dtype,
    recompute: str = "none",
    split: ActivationSplit = WHOLE,
) -> int:
    """Bytes that one block keeps for backward on a rank; weights are not counted.

    cfg is resolved. tokens: n of one micro-batch on the rank (b s / c), a multiple of t under
    sequence parallelism. With widths q of the query heads, k of the key (or value) heads, u of
    the up projection (2 d_ff gated, else d_ff), and t, e as everywhere, ``none`` keeps

    - the residual stream before each norm and the norms' results, n (2 d + 2 d) e, split over t
      by sequence parallelism (with ``keep_gathered`` the results are whole);
    - q, k, v and the attention's result, n (2 q + 2 k) e / t, with context parallelism by
      gathering the keys and values of all c ranks, and q and k before their norms; once more the
      result, q, where it lies by heads and the projection behind it reads it by tokens: with
      rotary positions unless attention writes ``by_tokens``, and with context parallelism;
    - the input and the result of the activation, n (u + d_ff) e / t (ReLU: the result alone);
    - in float32 a norm's statistics and a log-sum-exp for each query head.

    ``selective`` does without the norms' and the activation's results, ``full`` keeps the block's
    input alone. With ``norm_placement: post_branch`` the norms' inputs are not the residual
    stream, and nothing but the activation's result can be left out.
    """
    assert cfg.d_ff is not None and cfg.d_head is not None and cfg.n_kv_heads is not None
    stream = tokens // split.residual * cfg.d_model * dtype.itemsize
    if recompute == "full":
        return stream
    t = split.tensor
    q, _, ff = (width // t for width in widths(cfg))
    heads, groups = cfg.n_heads // t, max(cfg.n_kv_heads // t, 1)
    k = groups * cfg.d_head
    statistics = (1 if cfg.norm == "rmsnorm" else 2) * STATISTIC
    kept = 4 * stream
    if split.sequence and split.keep_gathered:
        kept += 2 * (tokens * cfg.d_model * dtype.itemsize - stream)
    elif recompute == "selective" and cfg.norm_placement == "pre":
        kept -= 2 * stream
    kept += 2 * statistics * (tokens // split.residual)
    up = 2 * ff if cfg.activation == "swiglu" else ff
    inner = up if recompute == "selective" else up + ff
    copied = (cfg.position == "rope" and not split.by_tokens) or split.context > 1
    values = (3 if copied else 2) * q + 2 * k * (1 if split.ring else split.context)
    values += ff if cfg.activation == "relu" else inner
    per_token = values * dtype.itemsize + heads * STATISTIC
    per_token += _qk_norm_bytes(cfg, q + k, heads + groups, dtype, t)
    return kept + tokens * per_token


def _qk_norm_bytes(
    cfg: ModelConfig, width: int, heads: int, dtype: torch.dtype, tensor: int
) -> int:
    """What norms of queries and keys keep per token; width, heads: both together, of a rank."""
    if cfg.qk_norm == "none":
        return 0
    statistics = (1 if cfg.norm == "rmsnorm" else 2) * STATISTIC
    if cfg.qk_norm == "head":
        return width * dtype.itemsize + heads * statistics
    if tensor == 1:
        return width * dtype.itemsize + 2 * statistics
    # Over ranks: the input and its normalised value in float32, and a scale for each of q and k.
    return 2 * width * STATISTIC + 2 * STATISTIC


def activation_bytes(
    cfg: ModelConfig,
    tokens: int,
    dtype: torch.dtype,
    recompute: str = "none",
    split: ActivationSplit = WHOLE,
    blocks: int | None = None,
) -> int:
    """Bytes alive between forward and backward on a rank: of ``blocks`` blocks (None: all), the
    input of the final norm, and the gradient of the hidden states that the loss has formed.

    Excludes weights, gradients, the loss's chunk of logits and the temporaries of a running block.
    """
    per_block = block_activation_bytes(cfg, tokens, dtype, recompute, split)
    stream = cfg.d_model * dtype.itemsize
    outside = stream * (tokens // split.residual) + stream * tokens
    return (cfg.n_layers if blocks is None else blocks) * per_block + outside
