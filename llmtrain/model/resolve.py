"""Fill in what a model section leaves to be derived, and refuse shapes that cannot be."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.model.adapters import check_targets
from llmtrain.model.layers import check_factorized
from llmtrain.model.scaling import resolve_scaling


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding: vocab_size up to a multiple of vocab_multiple."""
    assert cfg.vocab_size is not None
    return -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple


def complete(cfg: ModelConfig, vocab_size: int | None, seq_len: int) -> ModelConfig:
    """``cfg`` without nulls. Raises ConfigError naming the keys that contradict each other.

    vocab_size: of the tokenizer, None when there is none. d_ff defaults to 4 d_model, or for
    gated MLPs to 8/3 d_model rounded up to a multiple of 64.
    """
    vocab = cfg.vocab_size or vocab_size
    if vocab is None:
        raise ConfigError("model.vocab_size: there is no tokenizer to take it from; set it")
    if vocab_size is not None and vocab < vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab} is less than the tokenizer's {vocab_size}; "
            "leave it null or raise it"
        )
    d_head = cfg.d_head
    if d_head is None:
        if cfg.d_model % cfg.n_heads:
            raise ConfigError(
                f"model.d_head: d_model {cfg.d_model} is not a multiple of n_heads "
                f"{cfg.n_heads}; change one or set d_head"
            )
        d_head = cfg.d_model // cfg.n_heads
    _check_rotary(cfg, d_head)
    if cfg.parallel_residual and cfg.norm_placement != "pre":
        raise ConfigError(
            "model.parallel_residual: both branches read the stream before the block, which needs "
            "model.norm_placement pre"
        )
    kv = cfg.n_kv_heads or cfg.n_heads
    if cfg.n_heads % kv:
        raise ConfigError(
            f"model.n_kv_heads: n_heads {cfg.n_heads} is not a multiple of {kv}; choose a divisor"
        )
    if cfg.adapters is not None:
        check_targets(cfg)
    d_ff = cfg.d_ff
    if d_ff is None:
        gated = -(-(8 * cfg.d_model) // (3 * 64)) * 64
        d_ff = gated if cfg.activation == "swiglu" else 4 * cfg.d_model
    longest = cfg.max_seq_len or seq_len
    if longest < seq_len:
        raise ConfigError(
            f"model.max_seq_len: {longest} is less than data.seq_len {seq_len}; "
            "raise it or shorten the sequences"
        )
    found = replace(
        cfg,
        vocab_size=vocab,
        d_head=d_head,
        n_kv_heads=kv,
        d_ff=d_ff,
        max_seq_len=longest,
        scaling=resolve_scaling(cfg),
    )
    check_factorized(found)
    return found


def _check_rotary(cfg: ModelConfig, d_head: int) -> None:
    if cfg.position == "rope" and d_head % 2:
        raise ConfigError(f"model.d_head: {d_head} is odd, but rotary positions turn pairs")
    if int(d_head * cfg.rope_fraction) % 2 or int(d_head * cfg.rope_fraction) == 0:
        raise ConfigError(
            f"model.rope_fraction: {cfg.rope_fraction:g} of d_head {d_head} is "
            f"{int(d_head * cfg.rope_fraction)} dimensions; rotary positions turn pairs"
        )
    scaling = cfg.rope_scaling
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"model.rope_scaling.high_freq_factor: {scaling.high_freq_factor:g} must be above "
            f"low_freq_factor {scaling.low_freq_factor:g}"
        )


def resolve_model(cfg: RunConfig, vocab_size: int | None) -> ModelConfig:
    """The model section of a run without nulls, see ``complete``."""
    return complete(cfg.model, vocab_size, cfg.data.seq_len)
