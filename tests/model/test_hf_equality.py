"""Decoder against transformers' own models with the same random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import hf_models

from llmtrain.config.schema import LossConfig
from llmtrain.loss import head_loss
from llmtrain.model import Decoder, complete

NAMES = ("gpt2", "llama", "llama-mha", "qwen2", "qwen3", "olmo2")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal(name: str, tied: bool) -> None:
    theirs, shape = hf_models.make(name, tied)
    shape = complete(shape, None, 64)
    ours = Decoder(shape)
    weights = {n: p.detach() for n, p in theirs.named_parameters()}
    hf_models.load(ours, hf_models.renamed(weights, shape))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, hf_models.VOCAB, (3, 37), generator=generator)
    targets = torch.randint(0, hf_models.VOCAB, (3, 37), generator=generator)
    token_weights = torch.rand(3, 37, generator=generator)

    expected = theirs(tokens).logits
    logits = ours(tokens)
    assert logits.shape == expected.shape
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    nll = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none")
    (nll @ token_weights.flatten() / 50).backward()
    loss = ours(
        tokens,
        head_fn=lambda h, head: head_loss(
            h, head, targets, token_weights, LossConfig(chunk_tokens=29), 50.0
        ),
    ).loss
    loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for key, grad in hf_models.renamed(grads, shape).items():
        mine = dict(ours.named_parameters())[key].grad
        assert mine is not None
        assert not mine[len(grad) :].any()
        torch.testing.assert_close(mine[: len(grad)], grad, atol=2e-6, rtol=1e-4, msg=key)
