"""Norms and activations that cast for the next layer: the very bits of the separate passes, and
they are really used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.unit_scaled import assert_as_exact, batch, gpt, step
from torch import Tensor

from llmtrain import ops
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, fp8_matmul
from llmtrain.model import Decoder, apply_recompute, build_model, complete, hidden_layers
from llmtrain.ops import fused

pytestmark = pytest.mark.skipif(
    not ops.native_loaded(), reason="the compiled kernels are not built"
)
SHAPES: dict[str, dict[str, Any]] = {
    "pre-norm, swiglu": {"activation": "swiglu"},
    "post-norm, relu, biases": {
        "norm_placement": "post_branch",
        "activation": "relu",
        "mlp_bias": True,
        "attention_bias": True,
    },
    "dropout": {"dropout": 0.1, "norm_placement": "post_branch", "activation": "relu"},
}


def _model(shape: dict[str, Any], dtype: torch.dtype) -> Decoder:
    cfg = ModelConfig(vocab_size=101, d_model=32, n_layers=2, n_heads=4, d_ff=48, **shape)
    model = build_model(complete(cfg, 101, 16), seed=3, device="cpu", compute_dtype=dtype)
    for _, layer in hidden_layers(model):
        layer.set_matmul(fp8_matmul("mus_fp8", dtype, 2.0**6))
    return model


def _run(model: Decoder) -> list[Tensor]:
    model.zero_grad()
    out = model(torch.arange(48).view(3, 16) % 101)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_as_separate_passes(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(SHAPES[shape], dtype)
    made: list[str] = []
    for name in ("add_norm_cast", "norm_join_cast", "activation_cast", "activation_backward_cast"):
        real = getattr(torch.ops.llmtrain, name)

        def counted(*args: Any, name: str = name, real: Any = real) -> Any:
            made.append(name)
            return real(*args)

        monkeypatch.setattr(torch.ops.llmtrain, name, counted)
    fast = _run(model)
    norms = made.count("add_norm_cast"), made.count("norm_join_cast")
    assert norms == {"pre-norm, swiglu": (4, 0), "dropout": (0, 0)}.get(shape, (0, 2))
    assert made.count("activation_cast") == made.count("activation_backward_cast") == 2
    for module in ("llmtrain.model.norm.fuses_norm", "llmtrain.model.pair.fuses_activation"):
        monkeypatch.setattr(module, lambda *args: False)
    for a, b in zip(fast, _run(model), strict=True):
        assert torch.equal(a, b)


def test_a_cast_gradient_is_taken_for_its_own_tensor_only() -> None:
    layer = Linear(16, 32, matmul=fp8_matmul("mus_fp8", torch.float32, 4.0))
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(8, 16)
    handoff = layer.handoff(x)
    assert handoff is not None and handoff.factor == 4.0
    grad, other = torch.randn(8, 32), torch.randn(8, 32)
    casts = fused.activation_backward_cast(grad, torch.ones(8, 32), "relu", 4.0)[1]
    handoff.put(grad, casts)
    assert handoff.take(other) is None and handoff.take(grad) is None
    handoff.put(grad, casts)
    assert handoff.take(grad) is casts
    layer.set_matmul(fp8_matmul("fp8_current", torch.float32))
    assert layer.handoff(x) is None and not layer.takes_casts(x)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", ["pre-norm, swiglu", "post-norm, relu, biases"])
def test_nothing_reads_what_cuda_leaves_out(
    shape: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that only FP8 layers read are never written there: here they are NaN."""
    model = _model(SHAPES[shape], torch.float32)
    apply_recompute(model, recompute)
    expected = _run(model)
    lost: list[int] = []

    def placeholder(y: Tensor, like: Tensor, width: int) -> Tensor:
        lost.append(width)
        return y.new_full((1,), torch.nan).expand(*like.shape[:-1], width)

    monkeypatch.setattr(fused, "_shown", placeholder)
    for a, b in zip(_run(model), expected, strict=True):
        assert torch.equal(a, b)
    assert len(lost) >= 2


def test_unit_scaling_as_cuda_fuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm and GELU of ours round elsewhere than torch's, and a number near the border of two
    FP8 numbers may become the other: a few of them, so the results are near."""
    scaling = ScalingConfig(parametrization="mus", tau=0.3)
    shape = {"norm_placement": "post_branch", "activation": "gelu", "norm": "layernorm"}
    model = _model({**shape, "norm_bias": True, "scaling": scaling}, torch.float32)
    for module in ("llmtrain.model.norm.fuses_norm", "llmtrain.model.pair.fuses_activation"):
        monkeypatch.setattr(module, lambda *args: True)
    fast = _run(model)
    monkeypatch.undo()
    for a, b in zip(fast, _run(model), strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()
    assert not all(torch.equal(a, b) for a, b in zip(fast, _run(model), strict=True))


def test_fused_steps_are_as_exact_and_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds that the GPU's kernels are held to, on their references: no one tensor may be a
    tenth too large, lack its first rows or have them in another order."""
    steps = []
    for fuses in (True, False):
        for module in ("llmtrain.model.norm.fuses_norm", "llmtrain.model.pair.fuses_activation"):
            monkeypatch.setattr(module, lambda *args, fuses=fuses: fuses)
        steps.append(step(gpt("cpu"), *batch("cpu")))
    fused, alone = steps
    assert not torch.equal(fused[0], alone[0])
    assert_as_exact(fused, alone)
    for i, tensor in enumerate(fused):
        faults = [1.1 * tensor, tensor.clone(), tensor.flip(0)]
        faults[1][: max(1, len(tensor) // 8)] = 0
        for fault in faults:
            with pytest.raises(AssertionError, match=rf"^\({i}, "):
                assert_as_exact([*fused[:i], fault, *fused[i + 1 :]], alone)
