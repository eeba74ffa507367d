"""Which tensors a run's checkpoints leave out, because another checkpoint holds them unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.checkpoint.base import home_of, may_be_pruned, refer
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import MODEL_PREFIX, Base
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.model import Decoder, unpacked


@dataclass(frozen=True)
class LeftOut:
    """Names of tensors that are not saved, and the checkpoint that holds them."""

    names: frozenset[str]
    base: Base


def frozen_names(model: ModelConfig) -> frozenset[str]:
    """Stored names of the parameters that do not train, of the whole model."""
    with torch.device("meta"):
        params = Decoder(unpacked(model), torch.float32).named_parameters()
    return frozenset(MODEL_PREFIX + name for name, param in params if not param.requires_grad)


def left_out(
    cfg: RunConfig,
    model: ModelConfig,
    source: Path | None,
    resumed: bool,
    ranks: Ranks,
    warn: Callable[[str], None],
) -> LeftOut | None:
    """What ``checkpoint.save`` means for a run; None: everything is saved. Collective.

    source: the checkpoint that the run has just read, resumed: to go on from it. Raises ConfigError
    where ``trainable`` is asked for and the frozen weights lie in no other checkpoint.
    """
    wanted = cfg.checkpoint.save
    if wanted == "all" or source is None or model.adapters is None:
        return None
    # These may change what adapters leave alone.
    if cfg.average is not None or cfg.trainable or cfg.sparsity is not None:
        return None
    names = frozen_names(model)
    found = ranks.on_main(lambda: _base(source, names, resumed))
    never = model.adapters.base is not None or cfg.parallel.engine == "deepspeed"
    if found is None and model.adapters.freeze and (wanted == "trainable" or never):
        raise ConfigError(
            f"checkpoint.save: {source} holds the frozen weights itself, as a run saves them from "
            "its start; begin a new run with it as init.path, or set checkpoint.save=auto"
        )
    if found is None:
        return None
    base, fleeting = found
    if fleeting and not resumed:
        warn(
            f"checkpoints refer to {base.path} for the frozen weights, which its own run may prune "
            "when it goes on; keep it (checkpoint.keep_at), or set checkpoint.save=all"
        )
    return LeftOut(names, base)


def _base(source: Path, names: frozenset[str], resumed: bool) -> tuple[Base, bool] | None:
    home = home_of(source, names)
    if home is None or (resumed and home == source.resolve()):
        return None
    return refer(home), may_be_pruned(home)
