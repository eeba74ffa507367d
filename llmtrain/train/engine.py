"""Which engine holds the state of a run: FSDP2 or DeepSpeed."""

from __future__ import annotations

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.parallel import World, build_mesh
from llmtrain.parallel.hardware import Precision
from llmtrain.train.deepspeed_module import DeepSpeedModule
from llmtrain.train.module import TrainModule


def build_module(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, world: World
) -> TrainModule:
    """The train module that ``parallel.engine`` names.

    Raises EnvironmentFault when the degrees do not fit the world or DeepSpeed is not installed.
    """
    mesh = build_mesh(cfg.parallel, world)
    if cfg.parallel.engine == "deepspeed":
        return DeepSpeedModule(cfg, model_cfg, precision, world)
    return TrainModule(cfg, model_cfg, precision, world.device, mesh)
