"""The train module: model, layout and optimizer of this process, and one step's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.checkpoint.scattered import Scattered
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.batch import Batch
from llmtrain.linear import Compact, Linear, summing_gradients
from llmtrain.loss import LossOutput, head_loss
from llmtrain.model import (
    Decoder,
    Head,
    check_tensor_degree,
    init_weights,
    limit_training,
    packed_names,
    param_roles,
    rate_factors,
    set_magnitudes,
)
from llmtrain.ops import token_keys
from llmtrain.optim import (
    Schedule,
    build_groups,
    build_optimizer,
    clipped_step,
    create_state,
    gradient_norm,
    replace_parameter,
    set_learning_rate,
    state_tensors,
    sum_over_parts,
)
from llmtrain.parallel import (
    Layout,
    SplitSequence,
    finish_gradients,
    release_gathered,
    set_gradient_sync,
    split_batch,
)
from llmtrain.parallel.hardware import Precision
from llmtrain.train.laid_out import lay_out, sum_over_replicas

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class StepSums:
    """Sums over this rank's part of a batch; zero where another rank counts the same tokens.

    loss: 0-dim float64, already divided by the global weight. nll, weight: [n_sources] float64,
    weighted token cross-entropy in nats and token weights per source.
    """

    loss: Tensor
    nll: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Begun:
    """The forward of a step's last micro-batch, done ahead with denominator 1. weights: the batch's
    when it was done, and version: how often they had been changed."""

    output: LossOutput
    weights: Tensor
    version: int


@dataclass(frozen=True)
class StepResult:
    """What a step came to, equal on every rank.

    step: number of updates made, this one included. loss: mean weighted cross-entropy in nats
    (with z-loss) over the global batch. grad_norm: before clipping. weight: of the global batch.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    weight: float
    skipped: bool


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, without those that are packed weights."""
    packed = packed_names(model)
    return {name: p for name, p in model.named_parameters() if name not in packed}


class TrainModule:
    """Owns the model, its parallel layout and the optimizer.

    Master parameters and optimizer state are float32 whatever ``precision.compute`` is.
    """

    # Whether backward runs once for inputs and once for weights.
    in_parts = False
    # Whether ``begin`` works.
    begins = True
    _begun: _Begun | None = None
    # Weights that replicas hold as they are, beside FSDP2.
    apart: Sequence[str] = ()

    def __init__(
        self,
        cfg: RunConfig,
        model_cfg: ModelConfig,
        precision: Precision,
        layout: Layout,
    ) -> None:
        self.cfg, self.model_cfg, self.layout = cfg, model_cfg, layout
        self.device = layout.world.device
        self.context = layout.context
        check_tensor_degree(model_cfg, layout.degrees.tensor)
        with torch.device("meta"):
            model = Decoder(model_cfg, precision.compute, layout.tensor)
        self.roles = param_roles(model)
        limit_training(model, model_cfg, cfg)
        self.apart = [f"{name}.weight" for name in lay_out(model, cfg, precision, layout)]
        model.to_empty(device=self.device)
        init_weights(model, cfg.seed)
        self.model: nn.Module = model
        self.params: dict[str, nn.Parameter] = plain_parameters(model)
        self.compact: dict[str, Compact] = {}
        self.groups = build_groups(self.params, self.roles, cfg.optim, rate_factors(model_cfg))
        self.optimizer = build_optimizer(self.groups, cfg.optim)
        create_state(self.optimizer)

    def receive(self, batch: Batch) -> Batch:
        """What this rank computes on of its data rank's ``batch``, on its device."""
        if self.context is not None:
            masked = self.cfg.data.document_mask
            batch = split_batch(batch, self.context.rank, self.context.size, masked)
        return batch.to(self.device)

    def token_weight(self, batch: Batch) -> float:
        """Weight of a received batch, to be summed over all ranks."""
        if not self.layout.counts_tokens:
            return 0.0
        return float(batch.weights.sum(dtype=torch.float64))

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """``batch`` cut into forward passes of ``train.micro_batch_size`` sequences."""
        size = self.cfg.train.micro_batch_size or len(batch)
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def loss(self, batch: Batch, denominator: float) -> LossOutput:
        """Forward of one micro-batch. denominator: weight of the whole global batch."""
        return self._forward(**self.arguments(batch, denominator))

    def begin(self, batch: Batch, weigh: Callable[[Tensor], None]) -> None:
        """Forward of the last micro-batch of ``batch`` now, for the ``forward_backward`` to come.

        weigh(nll) is called inside it with the micro-batch's token losses [b, s], for those who
        need them to set ``batch.weights`` in place; what goes through the model for that is not
        computed again. Where the weights are changed once more afterwards, it is in vain.
        """
        micro = self.micro_batches(batch)[-1]
        output = self._forward(**self.arguments(micro, 1.0, weigh))
        self._begun = _Begun(output, batch.weights, batch.weights._version)

    def _take_begun(self, batch: Batch, denominator: float) -> LossOutput | None:
        begun, self._begun = self._begun, None
        if begun is None or begun.weights is not batch.weights:
            return None
        if begun.version != batch.weights._version:
            return None
        output = begun.output
        return LossOutput(output.loss / denominator, output.nll, output.z / denominator)

    def arguments(
        self,
        batch: Batch,
        denominator: float,
        weigh: Callable[[Tensor], None] | None = None,
    ) -> dict[str, Any]:
        """What the decoder is called with for a micro-batch. weigh: see ``head_loss``."""
        data = self.cfg.data

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            return head_loss(
                hidden,
                head,
                batch.targets,
                batch.weights,
                self.cfg.loss,
                denominator,
                in_parts=self.in_parts,
                weigh=weigh,
            )

        part = None if self.context is None else SplitSequence(self.context, batch.first)
        return {
            "tokens": batch.tokens,
            "positions": batch.positions if data.reset_positions or part else None,
            "doc_ids": batch.doc_ids if data.document_mask else None,
            "head_fn": head_fn,
            "keys": self.dropout_keys(batch),
            "part": part,
        }

    def _forward(self, **arguments: Any) -> LossOutput:
        output = self.model(**arguments)
        assert isinstance(output, LossOutput)
        return output

    def dropout_keys(self, batch: Batch) -> Tensor | None:
        """Keys of a micro-batch's tokens [b, s] where the model drops anything in training."""
        if not (self.model_cfg.dropout and self.model.training):
            return None
        # Not batch.positions: they may start again in each document.
        context, s = self.context, self.cfg.data.seq_len
        index = torch.arange(s) if context is None else context.positions(s)
        return token_keys(self.cfg.seed, batch.sample_ids, index.to(self.device))

    def forward_backward(self, batch: Batch, denominator: float, n_sources: int) -> StepSums:
        """All micro-batches of this rank's ``batch``; gradients are complete afterwards."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        nll = torch.zeros(n_sources, dtype=torch.float64, device=self.device)
        weight = torch.zeros_like(nll)
        micros, begun = self.micro_batches(batch), self._take_begun(batch, denominator)
        if begun is not None:
            micros = [micros[-1], *micros[:-1]]
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1 or self.cfg.parallel.reduce_every_micro_batch
            self._begin_micro_batch(last)
            output = self.loss(micro, denominator) if i or begun is None else begun
            begun = None  # its graph goes with its backward
            self._backward(output.loss)
            if self.layout.counts_losses:
                self.add_sums(micro, output, total, nll, weight)
        self._finish_gradients()
        return StepSums(total, nll, weight)

    def add_sums(
        self, micro: Batch, output: LossOutput, total: Tensor, nll: Tensor, weight: Tensor
    ) -> None:
        """Add a micro-batch to the sums of ``StepSums``, in place."""
        total += output.loss.detach()
        weighted = (output.nll * micro.weights).sum(1, dtype=torch.float64)
        nll.index_add_(0, micro.source_ids, weighted)
        weight.index_add_(0, micro.source_ids, micro.weights.sum(1, dtype=torch.float64))

    def _begin_micro_batch(self, last: bool) -> None:
        set_gradient_sync(self.model, last=last)

    def _backward(self, loss: Tensor) -> None:
        with summing_gradients():
            loss.backward()  # type: ignore[no-untyped-call]

    def _finish_gradients(self) -> None:
        if self.apart:
            sum_over_replicas((self.params[name] for name in self.apart), self.layout)
        if self.layout.tensor is not None:
            finish_gradients(list(self.params.values()), self.layout.tensor.group)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients (0-dim)."""
        return gradient_norm(self.counted().values(), self.layout)

    def counted(self) -> dict[str, nn.Parameter]:
        """Parameters that this rank counts in sums over the model; not a second copy of one."""
        return self.params

    def update(self, norm: Tensor, lr: float) -> None:
        """Clip, then one optimizer update at learning rate ``lr``; gradients are freed."""
        set_learning_rate(self.optimizer, lr)
        clipped_step(self.optimizer, self.params.values(), norm, self.cfg.optim.clip_norm)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    def train_only(self, names: Container[str]) -> None:
        """Of the parameters that ever train freeze all but these, until the next call.

        A frozen one keeps its value to the bit and has neither gradient nor moments; one that
        thaws begins with new moments.
        """
        for group in self.groups:
            for name, param in zip(group.names, group.params, strict=True):
                trains = name in names
                # FSDP2 gives what it gathers the same as the shard has.
                param.requires_grad_(trains)
                if not trains:
                    param.grad = None
                    self.optimizer.state.pop(param, None)
                elif not self.optimizer.state.get(param):
                    create_state(self.optimizer, [param])

    def pack(self, name: str, layer: Linear) -> None:
        """Hold the kept weights of a masked ``layer``, and their moments, alone from now on.

        name: of the parameter. What ``tensors`` gives can be saved then, and not be read into.
        """
        compact = layer.pack_weight()
        self._replace(name, layer.weight, compact.gather)
        self.compact[name] = compact

    def unpack(self, name: str, layer: Linear) -> None:
        """Undo ``pack``: what was pruned is zero."""
        compact = self.compact.pop(name)
        layer.unpack_weight()
        self._replace(name, layer.weight, compact.spread)

    def _replace(self, name: str, new: nn.Parameter, convert: Callable[[Tensor], Tensor]) -> None:
        old, self.params[name] = self.params[name], new
        for group in self.groups:
            group.params = [new if param is old else param for param in group.params]
        replace_parameter(self.optimizer, old, new, convert)

    def schedule(self, total_steps: int) -> Schedule:
        """The learning-rate schedule of a run of ``total_steps``."""
        tokens = self.cfg.train.global_batch_size * self.cfg.data.seq_len
        return Schedule.from_config(self.cfg.schedule, total_steps, tokens)

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights as this rank holds them, live; after writing to them call
        ``weights_changed``."""
        return self.params

    def weights_changed(self) -> None:
        """Let forward see what was written to ``weights``."""
        release_gathered(self.model)

    def set_magnitudes(self) -> None:
        """Let the lengths that DoRA trains begin as those of the frozen rows. Collective."""
        set_magnitudes(self.model)

    def sum_over_parts(self, values: Tensor) -> Tensor:
        """Sums over whole weights from sums over this rank's parts: float64 [weights, ...]."""
        return sum_over_parts(values, self.params.values(), self.layout)

    def frozen(self) -> dict[str, Tensor]:
        """Weights that do not train and are no part of ``tensors``, as they lie in memory in the
        compute dtype: by the parameter's name, to be filled from a checkpoint."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, live: ``model.<parameter>`` and ``optim.<parameter>.<key>``. Frozen
        weights that are packed or ``frozen`` are not among them; see ``pack``.
        """
        found: dict[str, Tensor] = {f"model.{name}": p for name, p in self.params.items()}
        found |= state_tensors(self.optimizer, self.params)
        for name, compact in self.compact.items():
            values = self.params[name].shape
            keys = (f"model.{name}", *(f"optim.{name}.{kind}" for kind in _MOMENTS))
            for key in keys:
                if key in found and found[key].shape == values:
                    found[key] = Scattered(found[key].detach(), compact.shape, compact.spread)
        return found

    def restore(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Replace the state by what ``read`` writes into the ``tensors`` that it is given."""
        read(self.tensors())
