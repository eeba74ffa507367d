"""The train module of a pipeline rank: some stages of the model, run by a schedule.

Every rank of a pipeline reads the same batches and makes masks, positions and dropout keys of a
micro-batch itself; only hidden states travel, and a micro-batch's number goes along with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.batch import Batch
from llmtrain.linear import backward_for
from llmtrain.loss import LossOutput
from llmtrain.model import (
    Decoder,
    KeyValueCache,
    Trainable,
    check_tensor_degree,
    init_weights,
    limit_training,
    param_roles,
    rate_factors,
    stage_parts,
)
from llmtrain.optim import build_groups, build_optimizer, create_state
from llmtrain.parallel import Layout
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.pipeline import Pipeline, build_pipeline, ends_group
from llmtrain.train.laid_out import lay_out
from llmtrain.train.module import StepSums, TrainModule, plain_parameters

TIED = "embedding.weight"


class Stage(nn.Module):
    """One stage: part of a decoder, applied to the micro-batch whose number comes along."""

    def __init__(self, owner: PipelineModule, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self._owner = [owner]  # in a list: it is no submodule of this one

    def forward(self, hidden: Tensor, micro: Tensor) -> Tensor:
        """hidden: of the stage before; not read by the first. The last returns its loss."""
        owner, number = self._owner[0], int(micro)
        received = None if self.decoder.first else hidden
        out = owner.run_stage(self.decoder, number, received)
        if isinstance(out, LossOutput):
            owner.outputs[number] = out
            return out.loss
        tensor: Tensor = out
        return tensor


class Chain(nn.Module):
    """This rank's stages; called like a decoder, all ranks of the pipeline get the logits."""

    def __init__(self, pipeline: Pipeline, cfg: ModelConfig) -> None:
        super().__init__()
        self.pipeline, self.cfg = pipeline, cfg
        self.stages = nn.ModuleList()

    def each(self) -> list[Stage]:
        """The stages of this rank, in order."""
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits [b, s, vocab_size] of tokens [b, s], without gradients; with a cache (of this
        rank's blocks) [b, 1, vocab_size], see ``Decoder.forward``."""
        decoders = dict(zip(self.pipeline.own, (s.decoder for s in self.each()), strict=True))
        some = next(iter(decoders.values()))
        logits = self.pipeline.chain(
            lambda stage, hidden: decoders[stage](tokens, hidden=hidden, cache=cache),
            some.travels(tokens),
        )
        if logits is None:
            width = tokens.shape[1] if cache is None else 1
            assert self.cfg.vocab_size is not None
            shape = (len(tokens), width, self.cfg.vocab_size)
            logits = torch.empty(shape, dtype=some.compute_dtype, device=tokens.device)
        logits = logits.contiguous()
        last = self.pipeline.owner(self.pipeline.stages - 1)
        dist.broadcast(logits, last, group=self.pipeline.group)
        return logits


class PipelineModule(TrainModule):
    """Owns this rank's stages, their layout over the other dimensions, and the optimizer.

    ``params`` have their global names (``blocks.7...``). Tied embeddings lie on the first and on
    the last rank: equal at first, their gradients are summed, and the first one counts.
    """

    begins = False

    def __init__(
        self, cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, layout: Layout
    ) -> None:
        assert layout.state is not None
        self.cfg, self.model_cfg, self.layout = cfg, model_cfg, layout
        self.device, self.context = layout.world.device, layout.context
        check_tensor_degree(model_cfg, layout.degrees.tensor)
        self.in_parts = cfg.parallel.pipeline_schedule == "zero_bubble"
        self.pipeline = build_pipeline(cfg.parallel, layout.state.get_group("pipeline"))
        self.micros: Sequence[Batch] = []
        self.outputs: dict[int, LossOutput] = {}
        self._denominator = 1.0
        self._schedules: dict[tuple[Any, ...], Any] = {}
        chain = Chain(self.pipeline, model_cfg)
        parts = stage_parts(model_cfg, cfg.data.seq_len, self.pipeline.stages)
        if cfg.trainable:
            Trainable(cfg, model_cfg).check_stages(parts)
        self.params, self.roles, self.compact = {}, {}, {}
        for index in self.pipeline.own:
            with torch.device("meta"):
                decoder = Decoder(model_cfg, precision.compute, layout.tensor, parts[index])
            self.roles |= param_roles(decoder)
            limit_training(decoder, model_cfg, cfg)
            stage = Stage(self, decoder)
            lay_out(decoder, cfg, precision, layout, root=stage)
            stage.to_empty(device=self.device)
            init_weights(decoder, cfg.seed)
            self.params |= plain_parameters(decoder)
            chain.stages.append(stage)
        self.model = chain
        self.groups = build_groups(self.params, self.roles, cfg.optim, rate_factors(model_cfg))
        self.optimizer = build_optimizer(self.groups, cfg.optim)
        create_state(self.optimizer)
        self._ends: dist.ProcessGroup | None = None
        if model_cfg.tie_embeddings:
            self._ends = ends_group(self.pipeline.group, layout.world.size)

    def run_stage(self, decoder: Decoder, number: int, hidden: Tensor | None) -> Any:
        """A stage's part of micro-batch ``number`` of the step that runs."""
        micro = self.micros[number]
        return decoder(hidden=hidden, **self.arguments(micro, self._denominator))

    def forward_backward(self, batch: Batch, denominator: float, n_sources: int) -> StepSums:
        """All micro-batches of the data rank's ``batch`` through the schedule."""
        self.micros, self._denominator = self.micro_batches(batch), denominator
        numbers = torch.arange(len(self.micros))
        arguments = (numbers,) if self.pipeline.rank == 0 else ()
        self._schedule(self.micros[0], len(self.micros)).step(
            *arguments, target=numbers, return_outputs=False, micro=numbers
        )
        self._finish_gradients()
        sums = self._sums(n_sources)
        self.micros, self.outputs = [], {}
        return sums

    def _schedule(self, micro: Batch, count: int) -> Any:
        """The schedule for micro-batches of this shape, kept for the next steps."""
        shape = (*micro.tokens.shape, count)
        if shape not in self._schedules:
            stages = self._chain().each()
            like = stages[0].decoder.travels(micro.tokens)
            make = self.pipeline.schedule
            self._schedules[shape] = make(self.cfg.parallel, stages, like, count, backward_for)
        return self._schedules[shape]

    def _chain(self) -> Chain:
        assert isinstance(self.model, Chain)
        return self.model

    def _sums(self, n_sources: int) -> StepSums:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        nll = torch.zeros(n_sources, dtype=torch.float64, device=self.device)
        weight = torch.zeros_like(nll)
        if self.layout.counts_losses:
            for number, output in sorted(self.outputs.items()):
                self.add_sums(self.micros[number], output, total, nll, weight)
        return StepSums(total, nll, weight)

    def _finish_gradients(self) -> None:
        super()._finish_gradients()
        if self._ends is not None and self.params[TIED].requires_grad:
            grad = self.params[TIED].grad
            assert grad is not None
            dist.all_reduce(_local(grad), group=self._ends)

    def counted(self) -> dict[str, nn.Parameter]:
        """All but a tied embedding's second copy: it counts on the first rank."""
        copy = TIED if self._ends is not None and self.pipeline.rank > 0 else None
        return {name: param for name, param in self.params.items() if name != copy}

    def loss(self, batch: Batch, denominator: float) -> LossOutput:
        """Forward of one micro-batch, for evaluation; zeros on all ranks but the last."""
        self.micros, self._denominator, self.outputs = [batch], denominator, {}
        stages = dict(zip(self.pipeline.own, self._chain().each(), strict=True))
        number = torch.zeros((), dtype=torch.int64)
        some = next(iter(stages.values())).decoder
        like = some.travels(batch.tokens)
        self.pipeline.chain(
            lambda stage, hidden: stages[stage](number if hidden is None else hidden, number), like
        )
        output = self.outputs.get(0)
        self.micros, self.outputs = [], {}
        if output is not None:
            return output
        zero = torch.zeros((), device=self.device)
        return LossOutput(zero, torch.zeros_like(batch.weights), zero)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
