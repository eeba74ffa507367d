"""A small unit-scaled GPT in FP8, a step of it, and whether two ways to compute it are as exact."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.linear import fp8_matmul
from llmtrain.model import Decoder, build_model, complete, hidden_layers


def gpt(device: str, compute: torch.dtype = torch.bfloat16) -> Decoder:
    """Unit scaling's own: LayerNorm at the end of branches, GELU; in bfloat16 with FP8 products."""
    scaling = ScalingConfig(parametrization="mus", tau=0.3)
    cfg = ModelConfig(
        vocab_size=101, d_model=64, n_layers=2, n_heads=4, d_ff=128, activation="gelu",
        norm="layernorm", norm_placement="post_branch", scaling=scaling,
    )  # fmt: skip
    model = build_model(complete(cfg, 101, 16), seed=3, device=device, compute_dtype=compute)
    if compute == torch.bfloat16:
        for _, layer in hidden_layers(model):
            layer.set_matmul(fp8_matmul("mus_fp8", compute, 2.0**6))
    return model


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Tokens and upstream gradients."""
    upstream = torch.randn(4, 16, 101, generator=torch.Generator().manual_seed(1))
    return torch.arange(64, device=device).view(4, 16), upstream.to(device)


def step(model: Decoder, tokens: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, then all gradients."""
    for param in model.parameters():
        param.grad = None
    out = model(tokens)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_as_exact(found: list[Tensor], other: list[Tensor]) -> None:
    """Each tensor of ``found``, a step of ``gpt``, is as near to the same in float32 as ``other``.

    Where one way rounds a value differently from another its FP8 number may be the next one, 6 or
    12% away: the two ways differ by as much as both are off (7 to 17%, relative), so it is that
    which is compared, tensor by tensor, and besides how much of the exact tensor is in each, its
    slope. Over 20 seeds on a CPU, casts fused and not, distances of matrices were 0.94 to 1.06 of
    each other and slopes 0.017 apart; of vectors of 64 numbers 0.77 to 1.18, and 0.026.
    """
    exact = step(gpt(str(found[0].device.type), torch.float32), *batch(found[0].device.type))
    for i, (one, two, true) in enumerate(zip(found, other, exact, strict=True)):
        near, apart = (1.15, 0.03) if true.numel() > 1000 else (1.5, 0.05)
        norm, size = true.double().norm(), true.numel()
        gaps = [float((x.double() - true).norm() / norm) for x in (one, two)]
        slopes = [float((x.double() * true).sum() / norm**2) for x in (one, two)]
        assert 1 / near < gaps[0] / gaps[1] < near, (i, size, gaps)
        assert abs(slopes[0] - slopes[1]) < apart, (i, size, slopes)
        assert gaps[0] < 0.3, (i, size, gaps)
