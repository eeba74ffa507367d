"""The decoder on a CUDA device against the CPU."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.loss import head_loss
from llmtrain.model import Decoder, build_model, complete

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CFG = complete(
    ModelConfig(vocab_size=211, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.1),
    None,
    256,
)


def _step(model: Decoder, device: str, documents: bool) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 211, (3, 257), generator=generator).to(device)
    doc_ids = (torch.arange(256) // 70).expand(3, 256).to(device) if documents else None
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = torch.ones(3, 256, device=device)
    cfg = LossConfig(chunk_tokens=100, z_loss=1e-3)
    loss = model(
        inputs,
        doc_ids=doc_ids,
        head_fn=lambda h, head: head_loss(h, head, targets, weights, cfg, 768.0).loss,
    )
    loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_loss_and_gradients_equal_the_cpu(
    dtype: torch.dtype, tolerance: float, documents: bool
) -> None:
    expected = _step(
        build_model(CFG, seed=1, device="cpu", compute_dtype=torch.float32), "cpu", documents
    )
    ours = _step(build_model(CFG, seed=1, device="cuda", compute_dtype=dtype), "cuda", documents)
    assert ours[0] == pytest.approx(expected[0], rel=tolerance / 10)
    for name, grad in ours[1].items():
        error = (grad - expected[1][name]).norm() / expected[1][name].norm()
        assert error < tolerance, (name, error)
