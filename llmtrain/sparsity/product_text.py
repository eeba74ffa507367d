"""Which products the sparse layers of a config get, in words, for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmtrain.config.schema import RunConfig
from llmtrain.config.sparsity import LIVE
from llmtrain.errors import ConfigError
from llmtrain.sparsity.auto import pick_products
from llmtrain.sparsity.case import Case, cases_of, choice_lines
from llmtrain.sparsity.on_gpu import promise
from llmtrain.sparsity.select import Sparse


def quantized(cfg: RunConfig) -> bool:
    """Whether hidden layers compute in another number format; all of them, or by rules."""
    section = cfg.quantization
    return section is not None and section.formats != {"none"}


def always_dense(cfg: RunConfig, on_cpu: bool) -> str | None:
    """Why the sparse layers of a run have dense products, whatever is faster; None: they need not.

    Raises ConfigError where ``sparsity.products: sparse`` was asked for and cannot be.
    """
    section = cfg.sparsity
    assert section is not None
    wanted = section.products == "sparse"
    reasons = (
        (cfg.train.compile, "train.compile does not know sparse ones"),
        (on_cpu and section.method == "slope", "a CPU's have no second mask, as slope needs"),
        (section.method in LIVE, f"{section.method} needs whole gradients"),
        (wanted and quantized(cfg), "FP8 and fake quantisation have no sparse ones"),
    )
    reason = next((text for holds, text in reasons if holds), None)
    if wanted and reason is not None:
        raise ConfigError(f"sparsity.products: sparse: {reason}; use auto")
    return reason


def product_lines(
    cfg: RunConfig,
    layers: Mapping[str, Sparse],
    dtype: torch.dtype,
    on_cpu: bool,
    gpu: torch.device | None,
) -> list[str]:
    """On this CPU or on ``gpu`` they are timed where they have not been; of a GPU elsewhere (None)
    it is said what it has for them. dtype: of the products. Raises as ``always_dense`` does."""
    assert cfg.sparsity is not None
    products, double = cfg.sparsity.products, cfg.sparsity.method == "slope"
    reason = None if products == "dense" else always_dense(cfg, on_cpu)
    if reason is not None:
        return [f"products of {len(layers)} sparse layers: dense ({reason})"]
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
    lines = choice_lines(cases, choices)
    if quantized(cfg):
        lines.append("layers in another number format, as long as they are: dense products")
    return ["products of sparse layers:", *("  " + t for t in lines)]
