"""FP8 weight gradients that are added to those of earlier micro-batches within the product."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layout_runs import alone, case
from helpers.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from llmtrain import ops
from llmtrain.config.number_formats import QuantizationConfig
from llmtrain.linear import Linear, Placement, fp8_matmul, summing_gradients
from llmtrain.linear.fp8 import Fp8Matmul
from llmtrain.ops import E4M3, E5M2
from llmtrain.parallel.tensor import TensorParallel

SCALE = 32**-0.5


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(name: str, dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(32, 48, matmul=fp8_matmul(name, dtype, 4.0), scale=SCALE)
    with torch.no_grad():
        layer.weight.copy_(_draw(48, 32, seed=0))
    return layer


def _micro_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(_draw(21, 32, seed=9 + i), _draw(21, 48, seed=99 + i)) for i in range(count)]


def test_the_operator_is_the_sum_of_products_in_float64() -> None:
    grad, x = ops.fp8_cast(_draw(48, 64, seed=1), E5M2), ops.fp8_cast(_draw(32, 64, seed=2), E4M3)
    total, scales = _draw(48, 32, seed=3), (torch.tensor(0.3), torch.tensor(7.0))
    exact = total.double() + 0.5 * 0.3 * 7.0 * (grad.double() @ x.double().t())
    assert ops.fp8_wgrad_(total, grad, x, 0.5, *scales)
    assert (total - exact).norm() < 1e-6 * exact.norm()
    assert ops.fp8_wgrad_(total, grad, x)
    exact += grad.double() @ x.double().t()
    assert (total - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["mus_fp8", "fp8_current"])
def test_later_micro_batches_add_to_the_gradient_itself(name: str) -> None:
    """Each micro-batch's own gradient, by autograd alone, summed in float64."""
    layer, found = _layer(name), _layer(name)
    exact = torch.zeros(48, 32, dtype=torch.float64)
    seen: list[Tensor | None] = []
    found.weight.register_hook(seen.append)
    at = None
    for x, upstream in _micro_batches(3):
        layer.zero_grad()
        layer(x).backward(upstream)
        assert layer.weight.grad is not None
        exact += layer.weight.grad.double()
        with summing_gradients():
            found(x).backward(upstream)
        assert found.weight.grad is not None
        assert at in (None, found.weight.grad.data_ptr())
        at = found.weight.grad.data_ptr()
    # Autograd has been given the first only.
    assert sum(grad is not None for grad in seen) == 1
    assert found.weight.grad is not None
    assert (found.weight.grad - exact).norm() < 1e-6 * exact.norm()


def test_without_leave_nothing_is_added_to_a_gradient() -> None:
    layer = _layer("mus_fp8")
    (x, upstream), *_ = _micro_batches(1)
    layer(x).backward(upstream)
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    (alone,) = torch.autograd.grad(layer(x), layer.weight, upstream)
    assert torch.equal(alone, before) and torch.equal(layer.weight.grad, before)


@pytest.mark.parametrize("spoil", [lambda g: g.half(), lambda g: g.t().contiguous().t()])
def test_gradients_that_a_product_cannot_be_added_to(spoil: Callable[[Tensor], Tensor]) -> None:
    layer, (first, second) = _layer("mus_fp8"), _micro_batches(2)
    layer(first[0]).backward(first[1])
    assert layer.weight.grad is not None
    kept = spoil(layer.weight.grad.clone())
    layer.weight.grad = None
    layer.weight.grad_dtype = kept.dtype
    layer.weight.grad = kept
    (alone,) = torch.autograd.grad(layer(second[0]), layer.weight, second[1])
    expected = (kept + alone.to(kept.dtype)).clone()
    with summing_gradients():
        layer(second[0]).backward(second[1])
    assert torch.equal(layer.weight.grad, expected)


def _split(rank: int) -> tuple[Tensor, bool]:
    mesh = init_device_mesh("cpu", (2,))
    tensor = TensorParallel(mesh.get_group(), rank, 2, sequence=False)
    layer = Linear(
        32,
        24,
        matmul=fp8_matmul("mus_fp8", torch.float32, 4.0),
        placement=Placement.COLUMN,
        tensor=tensor,
        scale=SCALE,
    )
    rows = slice(24 * rank, 24 * rank + 24)
    part = DTensor.from_local(_draw(48, 32, seed=0)[rows].clone(), mesh, [Shard(0)])
    layer.weight = torch.nn.Parameter(part)
    kept = True
    for i, (x, upstream) in enumerate(_micro_batches(3)):
        before = layer.weight.grad
        with summing_gradients():
            layer(x).backward(upstream[:, rows])
        kept = kept and (i == 0 or layer.weight.grad is before)
    grad = layer.weight.grad
    assert isinstance(grad, DTensor)
    return grad.to_local(), kept


@pytest.mark.dist
def test_tensor_parallel_parts_add_to_their_own() -> None:
    layer = _layer("mus_fp8")
    for x, upstream in _micro_batches(3):
        layer(x).backward(upstream)
    found = run_ranks(2, _split)
    assert layer.weight.grad is not None and all(kept for _, kept in found)
    grad = torch.cat([part for part, _ in found])
    assert (grad - layer.weight.grad).norm() < 1e-6 * layer.weight.grad.norm()


def test_training_has_them_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches of four layers: all but the first are added within the product."""
    added, real = Counter[bool](), Fp8Matmul.wgrad

    def wgrad(
        self: Fp8Matmul, grad: Any, x: Any, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        added[into is not None] += 1
        return real(self, grad, x, into, scale)

    monkeypatch.setattr(Fp8Matmul, "wgrad", wgrad)
    what = case(steps=1, micro=4, n_layers=1)
    alone(dataclasses.replace(what, quantization=QuantizationConfig()))
    assert added == {False: 4, True: 8}
