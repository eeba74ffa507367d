"""Which products the sparse layers of a config get, in words, for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmtrain.config.schema import RunConfig
from llmtrain.sparsity.auto import pick_products
from llmtrain.sparsity.case import Case, cases_of, choice_lines
from llmtrain.sparsity.on_gpu import promise
from llmtrain.sparsity.select import Sparse


def product_lines(
    cfg: RunConfig,
    layers: Mapping[str, Sparse],
    dtype: torch.dtype,
    on_cpu: bool,
    gpu: torch.device | None,
) -> list[str]:
    """On this CPU or on ``gpu`` they are timed where they have not been; of a GPU elsewhere (None)
    it is said what it has for them. dtype: of the products."""
    assert cfg.sparsity is not None
    products, double = cfg.sparsity.products, cfg.sparsity.method == "slope"
    if cfg.train.compile or (on_cpu and double):
        products = "dense"
    here = on_cpu or gpu is not None
    if products == "dense" or (here and products == "sparse"):
        return [f"products of {len(layers)} sparse layers: {products}"]
    ranks = cfg.parallel.tensor
    cases = cases_of(layers, ranks, dtype, gpu=not on_cpu, double=double)
    choices: Mapping[Case, object]
    if here:
        choices = pick_products(cases.values(), gpu=gpu)
    else:
        choices = {case: promise(case) for case in cases.values()}
    return ["products of sparse layers:", *("  " + t for t in choice_lines(cases, choices))]
