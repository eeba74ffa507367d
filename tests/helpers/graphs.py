"""What torch.compile makes of a module: which operators stand in its graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule


def counting(names: Counter[str]) -> Callable[..., Any]:
    """A backend that runs the graphs of forward and backward as they are and counts what is called
    in them."""

    def keep(graph: GraphModule, example: object) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)
