"""What a run would be on a cluster: memory, time, rate, days and cost of one layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.model import check_tensor_degree, flops_per_token
from llmtrain.parallel.hardware import DTYPES, Precision
from llmtrain.parallel.mesh import Degrees, resolve_degrees
from llmtrain.planner.blueprint import Blueprint, draw
from llmtrain.planner.communication import step_traffic
from llmtrain.planner.machine import Machine
from llmtrain.planner.memory import Memory, memory_estimate
from llmtrain.planner.setting import Setting
from llmtrain.planner.timing import StepTime, step_time
from llmtrain.sparsity import density_of_step

# Of the memory that a program gets: CUDA context, NCCL's buffers, fragmentation.
USABLE = 0.92
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Forecast:
    """One layout on one machine. stage: the pipeline rank whose memory is fullest."""

    setting: Setting
    machine: Machine
    memory: Memory
    stage: int
    time: StepTime
    sent: int

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.memory.peak <= USABLE * self.machine.memory

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        cfg = self.setting.cfg
        return cfg.train.global_batch_size * cfg.data.seq_len / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: causal attention counted as half, recomputation and pruned
        weights not at all."""
        model, cfg = self.setting.model, self.setting.cfg
        density = density_of_step(cfg, model, 0)
        per_token = flops_per_token(model, cfg.data.seq_len, density)
        peak = self.setting.degrees.world * self.machine.peak
        return self.tokens_per_second * per_token / peak

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, in whole steps."""
        batch = self.setting.cfg.train.global_batch_size * self.setting.cfg.data.seq_len
        return max(self.setting.cfg.train.duration.steps(batch), 1) * batch

    @property
    def days(self) -> float:
        """Of the whole run, without checkpoints, evaluation and interruptions."""
        return self.tokens / self.tokens_per_second / DAY

    def cost(self, price: float) -> float:
        """Of the whole run. price: of one GPU for one hour."""
        return self.days * 24 * self.setting.degrees.world * price


class Forecaster:
    """Forecasts layouts of one model on one machine; shapes are drawn once a tensor degree."""

    def __init__(self, cfg: RunConfig, model: ModelConfig, machine: Machine) -> None:
        self.cfg, self.model, self.machine = cfg, model, machine
        compute = "fp32" if cfg.precision.compute == "fp32" else "bf16"
        self.precision = Precision(DTYPES[compute], DTYPES[cfg.precision.reduce])
        self._drawn: dict[int, Blueprint] = {}

    def setting(self, cfg: RunConfig, world: int) -> Setting:
        """``cfg`` on ``world`` GPUs. Raises EnvironmentFault where the degrees do not multiply."""
        return Setting(cfg, self.model, self.precision, resolve_degrees(cfg.parallel, world))

    def blueprint(self, setting: Setting) -> Blueprint:
        """Shapes of all parameters at the setting's tensor degree; their ``local`` is not filled.

        Raises ConfigError where the model cannot be split so.
        """
        degree = setting.degrees.tensor
        if degree not in self._drawn:
            check_tensor_degree(self.model, degree)
            parallel = replace(
                setting.cfg.parallel,
                pipeline=1,
                pipeline_schedule="1f1b",
                pipeline_stages=None,
                replicate=1,
                context=1,
                shard=1,
            )
            alone = replace(setting.cfg, parallel=parallel)
            self._drawn[degree] = draw(replace(setting, cfg=alone, degrees=Degrees(tensor=degree)))
        return self._drawn[degree]

    def memory(self, setting: Setting) -> tuple[Memory, int]:
        """Of the fullest pipeline rank, and which that is: the first, the last or the second."""
        blueprint, p = self.blueprint(setting), setting.degrees.pipeline
        found = {i: memory_estimate(setting, blueprint, i) for i in {0, min(1, p - 1), p - 1}}
        stage = max(found, key=lambda i: found[i].peak)
        return found[stage], stage

    def forecast(self, cfg: RunConfig, world: int) -> Forecast:
        """Everything about one layout. Raises LlmtrainError where it cannot be."""
        setting = self.setting(cfg, world)
        blueprint = self.blueprint(setting)
        memory, stage = self.memory(setting)
        sent = sum(t.sent for t in step_traffic(setting, blueprint, stage))
        time = step_time(setting, blueprint, self.machine)
        return Forecast(setting, self.machine, memory, stage, time, sent)
