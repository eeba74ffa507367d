"""Products by TransformerEngine, an optional package: ``quantization.format: te``.

Written against its documented interface (``transformer_engine.pytorch.Linear``, ``autocast``, the
recipes of ``transformer_engine.common.recipe``; versions 2.4 to 2.20) and **not run yet**: it needs
a GPU. The weight stays ours; a ``te.Linear`` without memory of its own is called with it, and keeps
the amaxes of delayed scaling, which are not part of checkpoints. The package is imported only when
this format is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmtrain.errors import EnvironmentFault
from llmtrain.linear.matmul import DenseMatmul

# Names in transformer_engine.common.recipe.
RECIPES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def import_te() -> tuple[Any, Any]:
    """(transformer_engine.pytorch, transformer_engine.common.recipe). Raises EnvironmentFault with
    what the package says: it fails in many ways, not with ImportError alone."""
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
        return engine, importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EnvironmentFault(
            f"quantization.format: te needs TransformerEngine, which does not load here ({why}); "
            "run pip install --no-build-isolation 'transformer_engine[pytorch]', or use "
            "format: fp8_current, which needs nothing"
        ) from None


class TeMatmul(DenseMatmul):
    """Stands for TransformerEngine in a layer; one object per layer, whose state it holds.

    The products of ``Matmul`` itself are those of bfloat16. ``run`` is the whole layer.
    """

    def __init__(self, recipe: str, shape: tuple[int, int]) -> None:
        super().__init__(f"te {recipe}", torch.bfloat16)
        engine, _ = import_te()
        rows, columns = shape
        self._module: nn.Module = engine.Linear(
            columns, rows, bias=False, params_dtype=torch.bfloat16, device="meta"
        )

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """scale x weight^T + bias of x [..., in] and weight [out, in], in bfloat16. The scale
        multiplies the rounded product: TransformerEngine's has no such factor."""
        given = {"weight": weight.to(self.dtype)}
        y: Tensor = functional_call(self._module, given, (x.to(self.dtype),))
        y = y if scale == 1.0 else y * scale
        return y if bias is None else y + bias.to(y.dtype)


def enter_recipe(model: nn.Module, recipe: str) -> None:
    """Run every forward of ``model`` under the recipe. Once around the whole model: leaving it is
    when delayed scaling updates all scales."""
    engine, recipes = import_te()
    chosen = getattr(recipes, RECIPES[recipe])()
    entered: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if hasattr(engine, "autocast"):
            context = engine.autocast(enabled=True, recipe=chosen)
        else:  # before 2.9
            context = engine.fp8_autocast(enabled=True, fp8_recipe=chosen)
        context.__enter__()
        entered.append(context)

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)
