"""TransformerEngine as a format, against a stand-in with its documented interface: the package
itself needs a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import make_corpus, tiny_config
from torch import Tensor, nn

from llmtrain.cli.main import main
from llmtrain.errors import EnvironmentFault
from llmtrain.linear import Linear, TeMatmul, enter_recipe
from llmtrain.linear.te import RECIPES, import_te


class _Linear(nn.Module):
    """``transformer_engine.pytorch.Linear``, as far as it is used."""

    def __init__(
        self, columns: int, rows: int, bias: bool, params_dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype and ENTERED == [1]
        return F.linear(x, self.weight)


ENTERED = [0]
SEEN: list[str] = []


@contextmanager
def _autocast(enabled: bool, recipe: Any) -> Iterator[None]:
    SEEN.append(recipe)
    ENTERED[0] += 1
    try:
        yield
    finally:
        ENTERED[0] -= 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    engine, recipes = ModuleType("te.pytorch"), ModuleType("te.recipe")
    engine.Linear, engine.autocast = _Linear, _autocast  # type: ignore[attr-defined]
    for name in RECIPES.values():
        setattr(recipes, name, lambda name=name: name)
    for module in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_computes_with_its_own_weight(stand_in: None, recipe: str) -> None:
    layer = Linear(19, 45, True, matmul=TeMatmul(recipe, (45, 19)), scale=0.25)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=draw))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    model = nn.Sequential(layer)
    enter_recipe(model, recipe)
    x = torch.randn(3, 7, 19, generator=draw).requires_grad_()
    out = model(x)
    assert [RECIPES[recipe]] == SEEN and ENTERED == [0] and out.dtype == torch.bfloat16
    upstream = torch.randn(3, 7, 45, generator=draw).bfloat16()
    out.backward(upstream)
    w, b, u = (t.detach().double() for t in (layer.weight, layer.bias, upstream))  # type: ignore[union-attr]
    for ours, exact in (
        (out, 0.25 * x.detach().double() @ w.t() + b),
        (x.grad, 0.25 * u @ w),
        (layer.weight.grad, 0.25 * u.flatten(0, 1).t() @ x.detach().double().flatten(0, 1)),
    ):
        assert ours is not None and (ours - exact).norm() < 8e-3 * exact.norm()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3))
    assert ENTERED == [0]


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("Found empty `transformer-engine` meta package installed.\nLonger")

    monkeypatch.setattr("llmtrain.linear.te.importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(EnvironmentFault) as told:
        import_te()
    assert "(Found empty `transformer-engine` meta package installed.); run pip" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["device=cpu"], "te runs on NVIDIA GPUs only"),
        (["device=cuda", "parallel.tensor=2"], "te does not go with parallel.tensor"),
        (["device=cuda", "train.recompute=full"], "te does not go with train.recompute"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    config = tiny_config(tmp_path, make_corpus(tmp_path, documents=8))
    assert main(["train", str(config), "--dry-run", "quantization.format=te", *words]) == 2
    assert says in capsys.readouterr().err
