"""Which engine holds the state of a run: FSDP2 or DeepSpeed."""

from __future__ import annotations

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.parallel import Layout
from llmtrain.parallel.hardware import Precision
from llmtrain.train.deepspeed_module import DeepSpeedModule
from llmtrain.train.module import TrainModule


def build_module(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, layout: Layout
) -> TrainModule:
    """The train module that ``parallel.engine`` names.

    Raises EnvironmentFault when DeepSpeed is asked for and not installed.
    """
    kind = DeepSpeedModule if cfg.parallel.engine == "deepspeed" else TrainModule
    return kind(cfg, model_cfg, precision, layout)
