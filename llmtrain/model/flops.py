"""Closed forms: parameters and floating point operations of a shape."""

from __future__ import annotations

import math

from llmtrain.config.schema import ModelConfig
from llmtrain.model.layers import block_layers, count_alike, layer_shape, widths
from llmtrain.model.resolve import padded_vocab
from llmtrain.parallel.pipeline import Part, split_layers


def _matrices(cfg: ModelConfig) -> list[int]:
    """Elements of the weight matrices of each block."""
    found: list[int] = []
    for block, count in count_alike(cfg, range(cfg.n_layers)).items():
        found += [
            sum(math.prod(layer_shape(cfg, name)) for name in block_layers(cfg, block))
        ] * count
    return found


def param_counts(cfg: ModelConfig) -> dict[str, int]:
    """Parameters per role (embedding, hidden, norm, head, bias), ``total`` and
    ``non_embedding`` (total without embedding).

    cfg is resolved. Counts the padded vocabulary; a tied head counts once, as embedding.
    """
    q, kv, ff = widths(cfg)
    assert cfg.max_seq_len is not None
    table = padded_vocab(cfg) * cfg.d_model
    norm_width = 2 * cfg.d_model
    if cfg.qk_norm == "full":
        norm_width += q + kv
    elif cfg.qk_norm == "head":
        norm_width += 2 * _head(cfg)
    norms = cfg.n_layers * norm_width + cfg.d_model
    bias = norms if cfg.norm_bias else 0
    bias += cfg.n_layers * (q + 2 * kv) if cfg.attention_bias else 0
    bias += cfg.n_layers * cfg.d_model if cfg.attention_out_bias else 0
    if cfg.mlp_bias:
        bias += cfg.n_layers * ((2 * ff if cfg.activation == "swiglu" else ff) + cfg.d_model)
    counts = {
        "embedding": table + (cfg.max_seq_len * cfg.d_model if cfg.position == "learned" else 0),
        "hidden": sum(_matrices(cfg)),
        "norm": norms,
        "head": 0 if cfg.tie_embeddings else table,
        "bias": bias,
    }
    total = sum(counts.values())
    return {**counts, "total": total, "non_embedding": total - counts["embedding"]}


def _head(cfg: ModelConfig) -> int:
    assert cfg.d_head is not None
    return cfg.d_head


def flops_per_token(cfg: ModelConfig, seq_len: int, density: float = 1.0) -> float:
    """Model FLOPs of training on one token (forward and backward).

    density: kept share of the hidden layers' weights; a pruned one costs nothing.

    6 N + 6 s h d_head n_layers: N counts the elements of the matrices a token is multiplied
    with (blocks and head over the real vocabulary, not the embedding lookup), 2 FLOPs each
    forward and 4 backward. Attention is counted causally: a token sees s/2 others on average,
    4 FLOPs per head element and pair forward, twice that backward; counting the full square, as
    some systems do, would double the second term. Recomputation is not counted.
    """
    q, _, _ = widths(cfg)
    assert cfg.vocab_size is not None
    matrices = density * sum(_matrices(cfg)) + cfg.vocab_size * cfg.d_model
    return 6.0 * matrices + 6.0 * seq_len * q * cfg.n_layers


def stage_parts(cfg: ModelConfig, seq_len: int, stages: int) -> list[Part]:
    """The model cut into pipeline stages of nearly equal arithmetic.

    A block costs its matrices and causal attention, the head its matrix over the real
    vocabulary, the embedding nothing.
    """
    q, _, _ = widths(cfg)
    assert cfg.vocab_size is not None
    costs = [float(elements + seq_len * q) for elements in _matrices(cfg)]
    return split_layers(costs, 0.0, cfg.vocab_size * cfg.d_model, stages)
