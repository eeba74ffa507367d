"""Completing the model section, and refusing shapes that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.schema import DataConfig, ModelConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.model import complete, padded_vocab, resolve_model


def test_nulls_are_filled() -> None:
    run = RunConfig(
        model=ModelConfig(d_model=384, n_heads=6, n_layers=2), data=DataConfig(seq_len=128)
    )
    cfg = resolve_model(run, 8000)
    assert (cfg.vocab_size, cfg.n_kv_heads, cfg.d_head) == (8000, 6, 64)
    assert (cfg.d_ff, cfg.max_seq_len) == (1024, 128)
    assert padded_vocab(cfg) == 8000
    assert padded_vocab(complete(ModelConfig(vocab_size=50257), None, 8)) == 50304


@pytest.mark.parametrize(("activation", "d_ff"), [("swiglu", 704), ("gelu", 1024)])
def test_default_width_of_the_mlp(activation: str, d_ff: int) -> None:
    assert complete(ModelConfig(activation=activation), 64, 8).d_ff == d_ff


def test_given_values_stay() -> None:
    cfg = complete(
        ModelConfig(vocab_size=90, n_kv_heads=2, d_head=10, d_ff=33, max_seq_len=77), 80, 70
    )
    assert (cfg.vocab_size, cfg.n_kv_heads, cfg.d_head) == (90, 2, 10)
    assert (cfg.d_ff, cfg.max_seq_len) == (33, 77)


@pytest.mark.parametrize(
    ("keys", "vocab", "message"),
    [
        ({}, None, r"model.vocab_size: .* set it"),
        ({"vocab_size": 10}, 11, r"model.vocab_size: 10 is less than the tokenizer's 11"),
        ({"d_model": 100, "n_heads": 3}, 64, r"model.d_head: .*100.* 3"),
        ({"d_head": 7}, 64, r"model.d_head: 7 is odd"),
        ({"n_kv_heads": 3}, 64, r"model.n_kv_heads: n_heads 4 is not a multiple of 3"),
        ({"max_seq_len": 7}, 64, r"model.max_seq_len: 7 is less than data.seq_len 8"),
    ],
)
def test_impossible_shapes(keys: dict[str, Any], vocab: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(ModelConfig(**keys), vocab, 8)
