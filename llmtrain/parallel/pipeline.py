"""Pipeline parallelism: which rank has which layers, and in what order micro-batches run.

The n stages of a model lie on the p pipeline ranks in loops: rank r has stages r, r + p, ...
Schedules are those of torch.distributed.pipelining: GPipe (Huang et al. 2019, 1811.06965), 1F1B
(Narayanan et al. 2019), interleaved 1F1B (Narayanan et al. 2021, 2104.04473) and interleaved
zero bubble, which defers the gradients of weights (Qi et al. 2023, 2401.10241).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.parallel import ParallelConfig
from llmtrain.parallel.fsdp import gather_whole

LOOPED = ("interleaved", "zero_bubble")


@dataclass(frozen=True)
class Part:
    """What a stage holds: some blocks, and the embedding or the final norm and head."""

    blocks: range
    first: bool
    last: bool


def stages_per_rank(cfg: ParallelConfig) -> int:
    """Stages that lie on one pipeline rank."""
    if cfg.pipeline_stages is not None:
        return cfg.pipeline_stages
    return 2 if cfg.pipeline_schedule in LOOPED else 1


def split_layers(costs: Sequence[float], before: float, after: float, stages: int) -> list[Part]:
    """Cut layers into consecutive stages so that the most expensive one is cheapest.

    costs: of each layer; before, after: of the embedding and of final norm and head. Every
    stage gets at least one layer. Among equals the earlier stages get more.
    """
    return list(_split(tuple(costs), before, after, stages))


@functools.lru_cache(maxsize=256)
def _split(costs: tuple[float, ...], before: float, after: float, stages: int) -> tuple[Part, ...]:
    n = len(costs)
    assert 1 <= stages <= n
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(begin: int, end: int) -> float:
        return sums[end] - sums[begin] + (before if begin == 0 else 0) + (after if end == n else 0)

    # best[k][i]: the least maximum for the layers from i on, in k stages; and where the first ends.
    best = [{i: (cost_of(i, n), n) for i in range(n)}]
    for k in range(1, stages):
        row = {}
        for i in range(n - k):
            choices = ((max(cost_of(i, j), best[-1][j][0]), j) for j in range(i + 1, n - k + 1))
            row[i] = min(choices, key=lambda choice: (choice[0], -choice[1]))
        best.append(row)
    parts, begin = [], 0
    for k in range(stages - 1, -1, -1):
        end = best[k][begin][1]
        parts.append(Part(range(begin, end), begin == 0, end == n))
        begin = end
    return tuple(parts)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as one of its ranks sees it. rank, size: of ``group``. stages: in all."""

    group: dist.ProcessGroup
    rank: int
    size: int
    stages: int

    @property
    def own(self) -> range:
        """The stages of this rank, by number."""
        return range(self.rank, self.stages, self.size)

    def owner(self, stage: int) -> int:
        """Global rank of the process that has ``stage``."""
        return dist.get_global_rank(self.group, stage % self.size)

    def chain(self, run: Callable[[int, Tensor | None], Tensor], like: Tensor) -> Tensor | None:
        """One forward through all stages: what the last returns, on the rank that has it.

        run(stage, hidden) is called for this rank's stages. like: shape, dtype and device of
        what travels. Collective over the pipeline.
        """
        out: Tensor | None = None
        for stage in self.own:
            hidden = None
            if stage > 0:
                hidden = torch.empty_like(like)
                dist.recv(hidden, self.owner(stage - 1), group=self.group)
            out = run(stage, hidden)
            if stage < self.stages - 1:
                dist.send(out.contiguous(), self.owner(stage + 1), group=self.group)
                out = None
        return out

    def schedule(
        self,
        cfg: ParallelConfig,
        modules: Sequence[nn.Module],
        like: Tensor,
        micro_batches: int,
        around: Callable[[str], AbstractContextManager[None]],
    ) -> Any:
        """The schedule of a step of ``micro_batches``; modules: of this rank's stages.

        Every module takes (what travels, or the micro-batch's number in the first stage;
        micro=number) and returns what travels, the last one its loss. Gradients are summed over
        micro-batches and not divided. around(kind): entered around every backward pass, which is
        ``full`` or for ``input`` or ``weight`` gradients.
        """
        from torch.distributed.pipelining import PipelineStage, schedules

        class Announced(PipelineStage):
            """A stage that says what a backward pass is for."""

            def backward_maybe_with_nosync(self, backward_type: Any, *args: Any, **kw: Any) -> Any:
                if backward_type != "full":
                    # Torch looks for the parameters in the graph by the objects that the module
                    # holds at this moment, and the graph knows the gathered ones only.
                    gather_whole(self.submod)
                with around(backward_type):
                    return super().backward_maybe_with_nosync(backward_type, *args, **kw)

        travels = torch.empty_like(like, device="meta", requires_grad=True)
        number = torch.zeros(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [
            Announced(
                module,
                index,
                self.stages,
                like.device,
                input_args=(number if index == 0 else travels,),
                output_args=(loss if index == self.stages - 1 else travels,),
                group=self.group,
            )
            for index, module in zip(self.own, modules, strict=True)
        ]
        kind: Any = {
            "gpipe": schedules.ScheduleGPipe,
            "1f1b": schedules.Schedule1F1B,
            "interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        }[cfg.pipeline_schedule]
        several = cfg.pipeline_schedule in LOOPED
        return kind(
            stages if several else stages[0],
            micro_batches,
            loss_fn=lambda output, target: output,
            scale_grads=False,
        )


def build_pipeline(cfg: ParallelConfig, group: dist.ProcessGroup) -> Pipeline:
    """The pipeline of ``group``, the ranks that share the layers."""
    return Pipeline(group, group.rank(), group.size(), group.size() * stages_per_rank(cfg))


def ends_group(group: dist.ProcessGroup, world_size: int) -> dist.ProcessGroup | None:
    """The group of a pipeline's first and last rank, None on ranks between. Collective over all.

    world_size: of all processes. Tied embeddings lie on both ends.
    """
    size = group.size()
    stride = world_size // size
    own = dist.get_process_group_ranks(group)
    found = None
    for offset in range(stride):
        ranks = [offset, offset + (size - 1) * stride]
        made = dist.new_group(ranks)
        if own[0] == ranks[0] and dist.get_rank() in ranks:
            found = made
    return found
