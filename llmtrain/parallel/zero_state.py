"""A running DeepSpeed engine: what llmtrain does there by its own rules.

These are the gradient norm, clipping, dropping a step, sums over tensor-parallel ranks, and the
float32 state by parameter. DeepSpeed keeps partitioning, communication, offloading and the order
of it all. Its three optimizers store their shards under different names; ``_Shards`` is the one
place that knows them (written against DeepSpeed 0.19).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.parallel.fragment import Fragment
from llmtrain.parallel.mesh import Layout
from llmtrain.parallel.zero import data_group


@dataclass(frozen=True)
class Box:
    """What a rank holds of a parameter before ZeRO cuts it: all, or a tensor-parallel part.

    partial: the part is all of it, but each tensor rank forms one summand of its gradient.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    offset: tuple[int, ...]
    partial: bool = False

    @property
    def split(self) -> bool:
        """Whether other tensor ranks hold other elements."""
        return self.whole != self.part


@dataclass(frozen=True)
class Place:
    """Where a parameter's float32 elements lie on this rank.

    flat: index of the flat tensor; at: the run's start in it; start, length: the run within the
    row-major parameter. length 0: this rank holds none of it.
    """

    flat: int
    at: int
    start: int
    length: int


class _Shards:
    """The local shards of one of DeepSpeed's optimizers, whichever it is."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.bf16 = hasattr(optimizer, "fp32_groups_flat_partition")

    def masters(self) -> list[Tensor]:
        """The flat float32 parameters of this rank, live."""
        if self.stage3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self.bf16:
            return list(self.optimizer.fp32_groups_flat_partition)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def gradients(self) -> list[list[Tensor]]:
        """This rank's part of the reduced gradients, live, between backward and step.

        For each flat parameter, 1-D tensors that follow each other as its elements do.
        """
        optimizer = self.optimizer
        if self.bf16:
            return [[grad] for grad in optimizer.fp32_groups_gradient_flat_partition]
        offloaded = "offload_optimizer" if self.stage3 else "cpu_offload"
        if getattr(optimizer, offloaded):
            return [[master.grad] for master in self.masters() if master.grad is not None]
        return [
            [grad.view(-1) for grad in optimizer.averaged_gradients[index]]
            for index in range(len(self.masters()))
        ]

    def places(self, params: Mapping[str, nn.Parameter]) -> dict[str, Place]:
        """Where each parameter's elements are."""
        if self.stage3:
            return {name: self._place3(param) for name, param in params.items()}
        groups = self.optimizer.bf16_groups if self.bf16 else self.optimizer.bit16_groups
        index = {id(param): i for i, group in enumerate(groups) for param in group}
        return {name: _place(param, index[id(param)]) for name, param in params.items()}

    def _place3(self, param: Any) -> Place:
        flat, at, padded = self.optimizer.grad_position[self.optimizer.get_param_id(param)]
        start = min(padded * self.optimizer._get_param_partition_rank(param), param.ds_numel)
        return Place(flat, at, start, min(padded, param.ds_numel - start))

    def publish(self) -> None:
        """Copy the float32 masters into the parameters that forward reads, on all ranks."""
        optimizer = self.optimizer
        if not self.stage3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(self.masters())):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)

    def report_norm(self, value: float) -> None:
        """Make DeepSpeed's step believe ``value`` instead of computing a norm of its own.

        A negative one is its sign for a norm that is not finite, upon which it drops the
        gradients and leaves parameters and optimizer as they are.
        """
        norm = torch.tensor(value)
        if self.stage3:
            self.optimizer._get_norm_groups = lambda: [norm]
        elif not self.bf16:
            self.optimizer.scaled_global_norm = lambda norm_type=2: norm


def _place(param: Any, flat: int) -> Place:
    mapping = param._hp_mapping
    if mapping is None:
        return Place(flat, 0, 0, 0)
    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Place(flat, high.start, low.start, high.numel)


class ZeroState:
    """What a step does to a DeepSpeed engine, and the state of this rank in it.

    params: those of the engine's module by name; boxes: what this rank holds of each.
    """

    def __init__(
        self,
        engine: Any,
        params: Mapping[str, nn.Parameter],
        boxes: Mapping[str, Box],
        layout: Layout,
    ) -> None:
        self.engine, self._boxes, self._layout = engine, boxes, layout
        self._shards = _Shards(engine.optimizer)
        self.masters = self._shards.masters()
        self.places = self._shards.places(params)
        self._groups = [data_group(layout)]
        if layout.tensor is not None:
            self._groups.append(layout.tensor.group)

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; gradients are *summed* over ranks.

        ZeRO 3 can only average, so the loss is multiplied by what the gradients will be divided
        by, exactly for powers of two and to one rounding otherwise.
        """
        factor = self._layout.degrees.data if self._shards.stage3 else 1
        # A new tensor in any case: on the one that forward returned, DeepSpeed's hook would divide
        # by the number of micro-batches.
        self.engine.backward(loss * factor, scale_wrt_gas=False)

    def finish_gradients(self) -> None:
        """Sum the gradients of which each tensor rank formed one summand. Ranks of a tensor group
        cut their parameters alike, so what they hold of one fits together."""
        grads = self._gradients()
        owed = [grads[name] for name, box in self._boxes.items() if box.partial]
        if not owed or self._layout.tensor is None:
            return
        flat = torch.cat([grad.float() for grad in owed]).to(self._layout.world.device)
        dist.all_reduce(flat, group=self._layout.tensor.group)
        for grad, summed in zip(owed, torch.split(flat, [len(g) for g in owed]), strict=True):
            grad.copy_(summed)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm (0-dim float32); each element counts once, and squares are summed in
        float64, as in ``optim.gradient_norm``."""
        total = torch.zeros((), dtype=torch.float64, device=self._layout.world.device)
        for name, grad in self._gradients().items():
            if self._boxes[name].split or self._layout.tensor_rank == 0:
                norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
                total += norm.square().to(total.device)
        for group in self._groups:
            dist.all_reduce(total, group=group)
        return total.sqrt().float()

    def step(self, scale: float = 1.0) -> None:
        """One update with the gradients times ``scale``; they are freed."""
        if scale != 1.0:
            torch._foreach_mul_([g for parts in self._shards.gradients() for g in parts], scale)
        self._shards.report_norm(0.0)
        self.engine.step()

    def drop(self) -> None:
        """Forget the gradients of this step, accumulated ones too; nothing else changes."""
        optimizer = self.engine.optimizer
        if self._shards.bf16:
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
            return
        self._shards.report_norm(-1.0)
        # A bfloat16 run under ZeRO 2 looks at the norm only when told to check for overflow.
        optimizer.check_grad_overflow = True
        self.engine.step()
        optimizer.check_grad_overflow = False
        if not self._shards.stage3:
            # Left standing by DeepSpeed where the optimizer is offloaded in bfloat16.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    def sum_over_parts(self, values: Tensor) -> Tensor:
        """Sums over whole parameters from sums over this rank's elements: float64 [params, ...]."""
        for i, name in enumerate(self.places):
            if not self._boxes[name].split and self._layout.tensor_rank > 0:
                values[i] = 0
        for group in self._groups:
            dist.all_reduce(values, group=group)
        return values

    def box(self, name: str) -> Box:
        """This rank's tensor-parallel part of a parameter that trains."""
        return self._boxes[name]

    def publish(self) -> None:
        """Bring the parameters up to date after the float32 state was written in place."""
        self._shards.publish()

    def named(self, flats: Iterable[Tensor]) -> dict[str, Tensor]:
        """Flat tensors laid out like ``masters``, by parameter: live ``Fragment``s."""
        listed = [flat.detach() for flat in flats]
        return {
            name: Fragment(
                listed[place.flat][place.at : place.at + place.length],
                self._boxes[name].whole,
                place.start,
                self._boxes[name].part,
                self._boxes[name].offset,
            )
            for name, place in self.places.items()
        }

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's elements of every parameter's gradient, 1-D and live."""
        parts = self._shards.gradients()
        return {name: _run(parts[p.flat], p.at, p.length) for name, p in self.places.items()}


def frozen_fragment(param: Any, box: Box, layout: Layout) -> Fragment:
    """What this rank holds of a parameter that does not train: its partition, or all of it."""
    if not hasattr(param, "ds_tensor"):
        run = param.detach().view(-1)
        return Fragment(run, box.whole, 0, box.part, box.offset)
    each = param.ds_tensor.ds_numel
    start = min(each * layout.data_rank, param.ds_numel)
    length = min(each, param.ds_numel - start)
    run = param.ds_tensor.detach().view(-1)[:length]
    return Fragment(run, box.whole, start, box.part, box.offset)


def _run(parts: Sequence[Tensor], at: int, length: int) -> Tensor:
    """Elements [at, at + length) of ``parts`` put end to end; they lie in one of them."""
    if length == 0:
        return parts[0][:0]
    for part in parts:
        if at < len(part):
            assert at + length <= len(part)
            return part[at : at + length]
        at -= len(part)
    raise AssertionError("the gradients are shorter than the parameters")
