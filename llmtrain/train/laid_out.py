"""How a model on the meta device becomes one of a layout."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.linear import Linear
from llmtrain.model import (
    Decoder,
    apply_formats,
    apply_recompute,
    check_fp8_tokens,
    compile_blocks,
    hidden_layers,
    shard_over_tensor,
)
from llmtrain.parallel import Layout, apply_fsdp
from llmtrain.parallel.collectives import sum_together
from llmtrain.parallel.hardware import Precision
from llmtrain.sparsity import sparse_layers, why_dense


def lay_out(
    model: Decoder,
    cfg: RunConfig,
    precision: Precision,
    layout: Layout,
    root: nn.Module | None = None,
) -> list[str]:
    """Number formats, recomputation, compilation, tensor parallelism and FSDP2 of a model on the
    meta device.

    root: the module around ``model`` that is called in its place. Returns names of layers whose
    weights FSDP2 does not own; their gradients are summed by ``sum_over_replicas``.
    """
    device = layout.world.device
    apply_formats(model, model.cfg, cfg, device)
    if device.type == "cuda":
        micro = cfg.train.micro_batch_size or cfg.train.global_batch_size // layout.degrees.data
        tokens = micro * cfg.data.seq_len // layout.degrees.context
        if model.cfg.factorized is not None and layout.tensor is not None:
            # A factor that every rank has as a whole takes a shard of the tokens.
            tokens //= layout.tensor.size if layout.tensor.sequence else 1
        check_fp8_tokens(cfg, tokens)
    apply_recompute(model, cfg.train.recompute)
    if cfg.train.compile:
        compile_blocks(model)
    if layout.tensor is not None:
        assert layout.state is not None
        shard_over_tensor(model, layout.state["tensor"])
    if layout.fsdp is None:
        return []
    dtypes, apart = (precision.compute, precision.reduce), _kept_apart(model, cfg, layout)
    weights = {layer.weight for layer in apart.values()}
    apply_fsdp(root or model, model.blocks, layout.fsdp, cfg.parallel, dtypes, weights)
    for name, layer in hidden_layers(model):
        if name not in apart:
            layer.set_freed()
    return list(apart)


def _kept_apart(model: Decoder, cfg: RunConfig, layout: Layout) -> dict[str, Linear]:
    """Layers that will hold kept weights alone, of which FSDP2 must not own the weights: every
    replica has them as they are."""
    on_cpu = layout.world.device.type == "cpu"
    if cfg.sparsity is None or why_dense(cfg, layout.degrees, on_cpu) is not None:
        return {}
    names = sparse_layers(model.cfg, cfg.sparsity)
    return {name: layer for name, layer in hidden_layers(model) if name in names}


def sum_over_replicas(params: Iterable[Tensor], layout: Layout) -> None:
    """Add up the gradients of parameters that FSDP2 does not know, in place and all at once."""
    assert layout.state is not None
    grads = [param.grad for param in params if param.grad is not None]
    sum_together(grads, layout.state.get_group("replicate"))
