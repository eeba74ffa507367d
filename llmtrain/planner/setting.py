"""The numbers that all closed forms of a run start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.model import stage_parts
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.mesh import Degrees
from llmtrain.parallel.pipeline import Part as Stage
from llmtrain.parallel.pipeline import stages_per_rank

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Setting:
    """A run on a number of ranks.

    model: resolved. fused: whether the compiled CPU kernels run, whose temporaries are smaller.
    on_cpu: whether the ranks compute on CPUs.
    """

    cfg: RunConfig
    model: ModelConfig
    precision: Precision
    degrees: Degrees
    fused: bool = False
    on_cpu: bool = False

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return self.precision.compute.itemsize

    @property
    def weight_item(self) -> int:
        """Bytes of a weight as the forward pass finds it: FSDP2 gathers in the compute dtype."""
        return self.item if self.data_ranks > 1 else torch.float32.itemsize

    @property
    def data_ranks(self) -> int:
        """Ranks that FSDP2 spans: they hold the same tensor-parallel parts."""
        return self.degrees.data * self.degrees.context

    @property
    def shards(self) -> int:
        """Ranks over which FSDP2 shards a parameter; context ranks are among them."""
        return self.degrees.shard * self.degrees.context

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass."""
        return self.cfg.train.micro_batch_size or self.rank_sequences

    @property
    def rank_sequences(self) -> int:
        """Sequences per step of a rank."""
        return self.cfg.train.global_batch_size // self.degrees.data

    @property
    def micro_batches(self) -> int:
        """Forward passes per step of a rank."""
        return self.rank_sequences // self.sequences

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on a rank: b s / c."""
        return self.sequences * self.cfg.data.seq_len // self.degrees.context

    @property
    def padded_tokens(self) -> int:
        """``tokens`` up to a multiple of the tensor-parallel degree, as sequence parallelism
        splits them."""
        degree = self.degrees.tensor
        return -(-self.tokens // degree) * degree

    @property
    def sequence(self) -> bool:
        """Whether the residual stream is split by tokens over the tensor-parallel ranks."""
        return self.degrees.tensor > 1 and self.cfg.parallel.sequence

    @property
    def reductions(self) -> int:
        """How often a step reduces the gradients over data ranks; a pipeline does it once."""
        every = self.cfg.parallel.reduce_every_micro_batch and self.degrees.pipeline == 1
        return self.micro_batches if every else 1

    def stages(self, rank: int) -> list[Stage]:
        """What pipeline rank ``rank`` holds of the model: one or several stages."""
        per_rank = stages_per_rank(self.cfg.parallel) if self.degrees.pipeline > 1 else 1
        count = self.degrees.pipeline * per_rank
        parts = stage_parts(self.model, self.cfg.data.seq_len, count)
        return parts[rank :: self.degrees.pipeline]
