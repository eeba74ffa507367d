"""Behaviour of the decoder: masks, positions, precision, recomputation, hooks into the head."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.loss import head_loss
from llmtrain.model import (
    Decoder,
    apply_recompute,
    build_model,
    compile_blocks,
    complete,
    flops_per_token,
)
from llmtrain.model.decoder import Head
from llmtrain.ops import native_loaded

VOCAB = 101
LLAMA: dict[str, Any] = {"n_kv_heads": 2, "d_ff": 96}
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "norm_bias": True,
    "position": "learned",
    "activation": "gelu_tanh",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
OLMO2: dict[str, Any] = {"norm_placement": "post_branch", "qk_norm": "full"}
SHAPES = {"llama": LLAMA, "gpt2": GPT2, "olmo2": OLMO2, "qwen3": {**LLAMA, "qk_norm": "head"}}


def _model(
    shape: str = "llama", dtype: torch.dtype = torch.float32, seq_len: int = 64, **extra: Any
) -> Decoder:
    cfg = ModelConfig(
        **{
            "vocab_size": VOCAB,
            "d_model": 128,
            "n_layers": 2,
            "n_heads": 4,
            "init_std": 0.15,
            **SHAPES[shape],
            **extra,
        }
    )
    return build_model(complete(cfg, None, seq_len), seed=3, device="cpu", compute_dtype=dtype)


def _tokens(b: int, s: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (b, s), generator=torch.Generator().manual_seed(seed))


def _loss(model: Decoder, tokens: Tensor, **inputs: Any) -> Tensor:
    targets = tokens.roll(-1, 1)
    weights = torch.ones(tokens.shape)

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        cfg = LossConfig(chunk_tokens=50)
        return head_loss(hidden, head, targets, weights, cfg, float(tokens.numel())).loss

    loss = model(tokens, head_fn=head_fn, **inputs)
    assert isinstance(loss, Tensor)
    return loss


def _gradients(model: Decoder, *args: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, *args, **inputs).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_document_mask_equals_separate_sequences(
    shape: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = _model(shape, dtype)
    tokens = _tokens(2, 50)
    cuts = [[0, 1, 20, 50], [0, 33, 50]]
    doc_ids = torch.zeros(2, 50, dtype=torch.int32)
    positions = torch.zeros(2, 50, dtype=torch.int64)
    for row, bounds in enumerate(cuts):
        for number, (a, b) in enumerate(pairwise(bounds)):
            # The last document of a row is padding, as the loader marks it.
            doc_ids[row, a:b] = number if b < 50 else -1
            positions[row, a:b] = torch.arange(b - a)
    packed = model(tokens, positions=positions, doc_ids=doc_ids)
    for row, bounds in enumerate(cuts):
        for a, b in pairwise(bounds):
            alone = model(tokens[row : row + 1, a:b])
            torch.testing.assert_close(
                packed[row : row + 1, a:b], alone, atol=tolerance * 3, rtol=tolerance
            )
    unmasked = model(tokens, positions=positions)
    assert not torch.allclose(unmasked, packed, atol=0.1)


def test_document_mask_gradient_stays_inside() -> None:
    model = _model()
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda m, i, out: embedded.append(out))
    logits = model(_tokens(1, 30), doc_ids=torch.tensor([[0] * 12 + [1] * 18]))
    logits[0, 12:].square().sum().backward(inputs=embedded)
    grad = embedded[0].grad
    assert grad is not None and not grad[0, :12].any() and grad[0, 12:].any(1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_causal(shape: str) -> None:
    model = _model(shape)
    tokens = _tokens(1, 40)
    changed = tokens.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % VOCAB
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :25], b[:, :25], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, 25:], b[:, 25:], atol=0.1)


def test_positions_default_to_counting() -> None:
    for shape in ("llama", "gpt2"):
        model, tokens = _model(shape), _tokens(2, 20)
        counted = torch.arange(20).expand(2, 20)
        assert torch.equal(model(tokens), model(tokens, positions=counted))
        assert not torch.allclose(model(tokens), model(tokens, positions=counted * 2), atol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_fp32(shape: str) -> None:
    tokens = _tokens(3, 40)
    exact, low = _model(shape), _model(shape, torch.bfloat16)
    logits = low(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact(tokens)).norm() < 0.03 * exact(tokens).norm()
    reference = _gradients(exact, tokens)
    for name, grad in _gradients(low, tokens).items():
        assert grad.dtype == torch.float32
        error = (grad - reference[name]).norm() / reference[name].norm()
        assert error < 0.1, (name, error)


def test_bf16_training_follows_fp32() -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = _model("llama", dtype, init_std=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        losses[dtype] = []
        for step in range(12):
            loss = _loss(model, _tokens(4, 32, seed=step % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    a, b = (torch.tensor(x) for x in losses.values())
    assert a[0] - a[-1] > 1.0, "it learns"
    assert (a - b).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "olmo2"])
def test_recomputation_changes_nothing(shape: str, mode: str, dtype: torch.dtype) -> None:
    model, tokens = _model(shape, dtype), _tokens(2, 48)
    doc_ids = (torch.arange(48) // 20).expand(2, 48)
    expected = _gradients(model, tokens, doc_ids=doc_ids)
    apply_recompute(model, mode)
    assert list(dict(model.named_parameters())) == list(expected)
    for name, grad in _gradients(model, tokens, doc_ids=doc_ids).items():
        assert torch.equal(grad, expected[name]), name


def test_flops_equal_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def linear_flops(a_shape: tuple, b_shape: tuple, *_: object, **__: object) -> int:
        return 2 * math.prod(a_shape) * b_shape[0]

    def product_flops(out: tuple, a_shape: tuple, b_shape: tuple, *_: object, **__: object) -> int:
        return linear_flops(a_shape, b_shape)

    # The products that float32 takes on AMD processors; torch's counter does not know them.
    known = {torch.ops.mkldnn._linear_pointwise: linear_flops}
    if native_loaded():
        known[torch.ops.llmtrain.product_] = product_flops
    for shape in ("llama", "gpt2"):
        model, tokens = _model(shape), _tokens(2, 64)
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            model(tokens).sum().backward()
        counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
        kinds = ("aten.mm", "aten.addmm", *(str(op) for op in known))
        products = sum(v for k, v in counted.items() if k in kinds)
        cfg = model.cfg
        assert cfg.d_head is not None
        attention = 6 * 64 * cfg.n_heads * cfg.d_head * cfg.n_layers
        padding = 6 * (128 - VOCAB) * cfg.d_model
        ours = flops_per_token(cfg, 64) - attention + padding
        assert products == ours * tokens.numel()


def test_unknown_recompute_mode() -> None:
    with pytest.raises(ValueError, match="none, selective, full"):
        apply_recompute(_model(), "some")


def test_head_function_replaces_the_head() -> None:
    model, tokens = _model(), _tokens(2, 10)
    logits = model(tokens)
    hidden, head = model(tokens, head_fn=lambda h, m: (h, m))
    assert hidden.shape == (2, 10, 128) and head is model.head
    assert torch.equal(head(hidden), logits) and logits.shape == (2, 10, VOCAB)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_and_follow_the_weights() -> None:
    eager, compiled = (_model("llama", torch.bfloat16, n_layers=1) for _ in range(2))
    names = [n for n, _ in compiled.named_parameters()]
    compile_blocks(compiled)
    assert [n for n, _ in compiled.named_parameters()] == names
    for step in range(2):
        tokens = _tokens(2, 32, seed=step)
        expected = _gradients(eager, tokens)
        for name, grad in _gradients(compiled, tokens).items():
            assert (grad - expected[name]).norm() < 0.05 * expected[name].norm(), name
        for model in (eager, compiled):
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 1.5)
