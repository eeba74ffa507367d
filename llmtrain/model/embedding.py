"""Token and position embeddings, and the head that turns hidden states into logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul, Operand, OperandCache, Placement, Plan, apply_linear
from llmtrain.model.resolve import padded_vocab
from llmtrain.parallel.tensor import TensorParallel, local


class _Embed(torch.autograd.Function):
    """Rows of a table in another dtype; the table's gradient is summed in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(index, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        dense = torch.ops.aten.embedding_dense_backward(grad.float(), index, ctx.rows, -1, False)
        return dense.to(ctx.dtype), None, None


class Embedding(nn.Module):
    """Token or position embedding. index: integers [...] -> [..., d_model] of ``dtype``.

    partial: among tensor-parallel ranks each looks up other tokens, see ``Norm``.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, *, partial: bool = False) -> None:
        super().__init__()
        self.dtype, self.partial = dtype, partial
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32))

    def tensor_placement(self, name: str) -> TensorPlacement:
        """Placement of the table on the tensor dimension of the mesh."""
        return Replicate()

    def tensor_partial(self, name: str) -> bool:
        """Whether this rank's gradient of a replicated table is one summand of it."""
        return self.partial

    def forward(self, index: Tensor) -> Tensor:
        return self._look_up(local(self.weight, partial=self.partial), index)

    def _look_up(self, weight: Tensor, index: Tensor) -> Tensor:
        out: Tensor = _Embed.apply(weight, index, self.dtype)  # type: ignore[no-untyped-call]
        return out


class VocabularyEmbedding(Embedding):
    """A token embedding whose rows are split over tensor-parallel ranks.

    Each rank looks up the words it owns, and the sum over ranks is every token's row: [b, s] ->
    [b, s, d_model], or this rank's token shard under sequence parallelism.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, tensor: TensorParallel) -> None:
        super().__init__(rows, width, dtype)
        self.tensor = tensor

    def tensor_placement(self, name: str) -> TensorPlacement:
        return Shard(0)

    def forward(self, index: Tensor) -> Tensor:
        weight = local(self.weight)
        own = index - self.tensor.rank * len(weight)
        owned = (own >= 0) & (own < len(weight))
        rows = self._look_up(weight, torch.where(owned, own, 0))
        return self.tensor.leave(rows * owned.unsqueeze(-1))


class Head(nn.Module):
    """Logits of the next token. hidden [..., d_model] -> [..., vocab_size].

    ``weight`` is [padded vocabulary, d_model], or this rank's rows of it under ``tensor``: the
    head's own parameter, or the embedding's when tied. Rows from ``vocab_size`` on are padding
    and never take part. scale: a constant that multiplies the logits.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        tied_to: Embedding | None,
        matmul: Matmul,
        tensor: TensorParallel | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        assert cfg.vocab_size is not None
        self.vocab_size, self.matmul, self.tensor = cfg.vocab_size, matmul, tensor
        self.scale = scale
        # Looked up through the owner each time: FSDP2 replaces parameters of their owner.
        self._tied_to = [] if tied_to is None else [tied_to]
        self._cache = OperandCache()
        if tied_to is None:
            rows = padded_vocab(cfg)
            self.projection = Linear(
                cfg.d_model,
                rows,
                role="head",
                placement=Placement.COLUMN,
                matmul=matmul,
                tensor=tensor,
                scale=scale,
            )

    @property
    def weight(self) -> Tensor:
        """This rank's part of the parameter, or of what FSDP2 gathered for this forward."""
        return local(self._tied_to[0].weight if self._tied_to else self.projection.weight)

    def operand(self) -> Operand:
        """``weight`` as the products read it, without gradient."""
        return self._cache.get(self.weight, self.matmul)

    def forward(self, hidden: Tensor) -> Tensor:
        plan = Plan(self.matmul, scale=self.scale)
        logits = apply_linear(hidden, self.weight, None, self.operand(), plan)
        if self.tensor is not None:
            logits = self.tensor.gather_vocabulary(logits)
        return logits[..., : self.vocab_size]
