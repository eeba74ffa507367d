"""Which train module runs: of a whole model or of pipeline stages, on FSDP2 or DeepSpeed."""

from __future__ import annotations

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.parallel import Layout
from llmtrain.parallel.hardware import Precision
from llmtrain.train.deepspeed_module import DeepSpeedModule
from llmtrain.train.module import TrainModule
from llmtrain.train.pipeline_module import PipelineModule


def build_module(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, layout: Layout
) -> TrainModule:
    """The train module that ``parallel`` calls for.

    Raises EnvironmentFault when DeepSpeed is asked for and not installed.
    """
    kind: type[TrainModule] = TrainModule
    if cfg.parallel.engine == "deepspeed":
        kind = DeepSpeedModule
    elif layout.degrees.pipeline > 1:
        kind = PipelineModule
    return kind(cfg, model_cfg, precision, layout)
