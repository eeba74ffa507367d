"""Rules of ``model.adapters`` and of checkpoints that hold adapters alone."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.schema import RunConfig


def check_adapters(cfg: RunConfig, faults: Collector) -> None:
    """Add a fault for what cannot stand beside adapters, or needs them."""
    if cfg.checkpoint.save != "trainable":
        return
    if cfg.model.adapters is None:
        message = "trainable needs model.adapters: without them every weight trains; write auto"
        faults.add("checkpoint.save", message, "model.adapters")
    elif cfg.init is None:
        message = "trainable needs init.path, the checkpoint that holds the frozen weights"
        faults.add("checkpoint.save", f"{message}; set it, or write auto", "init.path")
    elif cfg.average is not None:
        message = "trainable does not go together with average, which writes to all weights"
        faults.add("checkpoint.save", f"{message}; write auto", "average")
