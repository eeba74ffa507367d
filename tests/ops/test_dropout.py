"""Dropout by hash: the share, independence of streams, tokens and channels, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.model import Decoder, complete
from llmtrain.model.dropout import Dropout
from llmtrain.ops import dropout, stream_number, token_keys

SAMPLES = torch.arange(64) + 10**12


def _keys(seed: int = 3) -> Tensor:
    return token_keys(seed, SAMPLES, torch.arange(33))


def _kept(stream: str, seed: int = 3, p: float = 0.3, width: int = 65) -> Tensor:
    keys = _keys(seed)
    return dropout(torch.ones(*keys.shape, width), keys, stream_number(stream), p) != 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_is_right_everywhere(p: float) -> None:
    kept = _kept("a", p=p).float()
    n = kept.numel()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    for dims in ((0, 1), (0, 2), (1, 2)):
        part = kept.mean(dims)
        bound = 5.5 * (p * (1 - p) / (n / len(part))) ** 0.5
        assert float((part - (1 - p)).abs().max()) < bound, dims


def test_masks_are_uncorrelated() -> None:
    base = _kept("blocks.0.mlp").float()
    n = base.numel()
    others = {
        "stream": _kept("blocks.1.mlp"),
        "seed": _kept("blocks.0.mlp", seed=4),
        "next token": base.roll(1, 1),
        "next sample": base.roll(1, 0),
        "next channel": base.roll(1, 2),
    }
    for name, other in others.items():
        pair = torch.stack((base.flatten(), other.float().flatten()))
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / n**0.5, name


def test_gradient_and_scale() -> None:
    keys = _keys()
    x = torch.randn(*keys.shape, 20, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    y = dropout(x, keys, 17, 0.25)
    y.backward(upstream)
    factor = torch.where(y == 0, 0.0, 1 / 0.75).double()
    torch.testing.assert_close(y, x.detach() * factor)
    torch.testing.assert_close(x.grad, upstream * factor)


def test_a_part_of_the_tokens_has_the_same_mask() -> None:
    whole = _kept("a")
    part = token_keys(3, SAMPLES[5:9], torch.arange(33)[7:])
    again = dropout(torch.ones(*part.shape, 65), part, stream_number("a"), 0.3) != 0
    assert torch.equal(again, whole[5:9, 7:])


def test_keys_of_tokens_differ() -> None:
    keys = token_keys(0, torch.arange(2000), torch.arange(500)).flatten()
    # A million draws of 32 bits: about 116 pairs fall together by chance.
    assert len(keys) - len(keys.unique()) < 200
    assert len({stream_number(f"blocks.{i}.{b}") for i in range(500) for b in "am"}) == 1000


def test_every_place_of_a_model_has_a_stream_of_its_own() -> None:
    shape = ModelConfig(d_model=16, n_layers=5, n_heads=2, d_ff=16, vocab_size=32, dropout=0.1)
    with torch.device("meta"):
        model = Decoder(complete(shape, 32, 8))
    streams = [m.stream for m in model.modules() if isinstance(m, Dropout)]
    assert len(streams) == len(set(streams)) == 11
