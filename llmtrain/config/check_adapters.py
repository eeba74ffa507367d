"""Rules of ``model.adapters`` and of checkpoints that hold adapters alone."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.schema import RunConfig


def check_adapters(cfg: RunConfig, faults: Collector) -> None:
    """Add a fault for what cannot stand beside adapters, or needs them."""
    section = cfg.model.adapters
    if section is not None and section.base is not None:
        _check_packed(cfg, section.base, faults)
    if cfg.checkpoint.save != "trainable":
        return
    if section is None:
        message = "trainable needs model.adapters: without them every weight trains; write auto"
        faults.add("checkpoint.save", message, "model.adapters")
    elif not section.freeze:
        message = "trainable leaves nothing out with model.adapters.freeze: false; write auto"
        faults.add("checkpoint.save", message, "model.adapters.freeze")
    elif cfg.init is None:
        message = "trainable needs init.path, the checkpoint that holds the frozen weights"
        faults.add("checkpoint.save", f"{message}; set it, or write auto", "init.path")
    for key in ("average", "trainable", "sparsity"):
        if getattr(cfg, key):
            message = f"trainable does not go together with the section {key}, which decides itself"
            faults.add("checkpoint.save", f"{message} what changes; write auto", key)


def _check_packed(cfg: RunConfig, form: str, faults: Collector) -> None:
    """Rules of ``model.adapters.base``: the packed weights are those of another checkpoint."""
    where = "model.adapters.base"
    if cfg.checkpoint.save == "all":
        message = f"{form} weights are never saved, the checkpoint of init.path holds them; write"
        faults.add("checkpoint.save", f"all: {message} auto", where)
    if cfg.init is None:
        message = f"{form} packs the weights of another checkpoint; set init.path, or base to null"
        faults.add(where, message, "init.path")
    if cfg.quantization is not None:
        message = f"{form} says how frozen weights are kept, and quantization how products are made"
        faults.add(where, f"{message}; take one of them away", "quantization")
    if cfg.average is not None:
        message = f"{form} weights cannot be averaged; take average away or set it to null"
        faults.add(where, message, "average")
    if cfg.trainable:
        message = f"{form} weights cannot train; take the section trainable away or set it to null"
        faults.add(where, message, "trainable")
    section = cfg.model.adapters
    if section is not None and not section.freeze:
        message = f"{form} weights cannot train; set model.adapters.freeze to true, or base to null"
        faults.add(where, message, "model.adapters.freeze")
    if cfg.sparsity is not None:
        message = f"{form} weights cannot be masked; take sparsity away or set base to null"
        faults.add(where, message, "sparsity")
    if cfg.parallel.engine == "deepspeed":
        message = f"{form} does not work with parallel.engine deepspeed, which casts all weights"
        faults.add(where, f"{message}; use the native engine or set it to null", "parallel.engine")
