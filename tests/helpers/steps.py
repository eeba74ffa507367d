"""A train module of a small model on any layout, one step of it, and what the step sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config import RunConfig, from_dict
from llmtrain.config.schema import ModelConfig
from llmtrain.data.batch import Batch
from llmtrain.model import complete
from llmtrain.ops import native_loaded
from llmtrain.parallel import Layout, World, build_layout, resolve_degrees
from llmtrain.parallel.hardware import DTYPES, Precision
from llmtrain.planner import Setting
from llmtrain.train.engine import build_module
from llmtrain.train.module import TrainModule

# (collective, dimension, ranks) -> (calls, bytes)
Sent = dict[tuple[str, str, int], tuple[int, int]]


def small_run(**changes: Any) -> RunConfig:
    """A run of a 3-layer model on 8 sequences of 24 tokens. changes: dotted keys with "__"."""
    raw: dict[str, Any] = {
        "model": {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 48, "vocab_size": 250},
        "data": {"corpus": "none", "seq_len": 24},
        "loss": {"chunk_tokens": 20},
        "precision": {"compute": "fp32"},
        "train": {"global_batch_size": 8},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    return from_dict(raw)


def setting_of(cfg: RunConfig, world: int, compute: torch.dtype = torch.float32) -> Setting:
    """The planner's view of the run on ``world`` ranks of this machine."""
    model: ModelConfig = complete(cfg.model, None, cfg.data.seq_len)
    degrees = resolve_degrees(cfg.parallel, world)
    precision = Precision(compute, DTYPES[cfg.precision.reduce])
    return Setting(cfg, model, precision, degrees, fused=native_loaded())


def build(setting: Setting, rank: int) -> TrainModule:
    """The real train module of ``rank``, in the process group that is there."""
    world = World(rank, setting.degrees.world, rank, torch.device("cpu"), None)
    assert setting.model.n_kv_heads is not None
    layout = build_layout(setting.cfg.parallel, world, setting.model.n_kv_heads)
    return build_module(setting.cfg, setting.model, setting.precision, layout)


def batch_of(setting: Setting, rank: int = 0) -> Batch:
    """Random tokens for one step of a rank."""
    n, s = setting.rank_sequences, setting.cfg.data.seq_len
    generator = torch.Generator().manual_seed(rank)
    vocab = setting.cfg.model.vocab_size or 2
    tokens = torch.randint(0, vocab, (n, s + 1), generator=generator)
    positions = torch.arange(s).expand(n, s)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=torch.ones(n, s),
        doc_ids=torch.zeros(n, s, dtype=torch.int32),
        positions=positions,
        source_ids=torch.zeros(n, dtype=torch.int64),
        sample_ids=torch.arange(n),
    )


def step(module: TrainModule, batch: Batch) -> None:
    """One optimizer update."""
    batch = module.receive(batch)
    module.forward_backward(batch, float(batch.weights.sum()), 1)
    module.update(module.gradient_norm(), 1e-3)


class CountTraffic(TorchDispatchMode):
    """Counts every collective that goes through torch's dispatcher, FSDP2's included."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str, int]] = Counter()
        self.payload: Counter[tuple[str, str, int]] = Counter()
        self.names: dict[str, str] = {}
        if layout.state is not None:
            for dim in ("pipeline", "replicate", "shard", "tensor"):
                self.names[layout.state.get_group(dim).group_name] = dim
            # A dimension that spans the world shares the world's group; the others have size 1.
            for dim in ("pipeline", "replicate", "shard", "tensor"):
                group = layout.state.get_group(dim)
                if group.size() > 1:
                    self.names[group.group_name] = dim
        if layout.context is not None:
            self.names[layout.context.group.group_name] = "context"
        if layout.tensor is not None and layout.tensor.kv_group is not None:
            self.names[layout.tensor.kv_group.group_name] = "tensor"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(str(func).split(".")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        kinds: dict[str, tuple[str, Callable[[], Tensor]]] = {
            "_allgather_base_": ("all-gather", lambda: args[0]),
            "_reduce_scatter_base_": ("reduce-scatter", lambda: args[1]),
            "allreduce_": ("all-reduce", lambda: args[0][0]),
            "all_reduce": ("all-reduce", lambda: args[0]),
            "alltoall_base_": ("all-to-all", lambda: args[1]),
            "send": ("send", lambda: args[0][0]),
        }
        if name in ("wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier"):
            return
        kind, tensor = kinds[name]
        group, size = self._group(args)
        if size == 1:
            return
        key = (kind, self.names.get(group, "pipeline"), size)
        self.calls[key] += 1
        self.payload[key] += tensor().numel() * tensor().element_size()

    @staticmethod
    def _group(args: tuple[Any, ...]) -> tuple[str, int]:
        for arg in args:
            if isinstance(arg, torch.ScriptObject):
                try:
                    group = dist.ProcessGroup.unbox(arg)
                except RuntimeError:  # a reduce operation
                    continue
                return group.group_name, group.size()
        name = args[-1]
        assert isinstance(name, str)
        return name, torch.distributed.distributed_c10d._resolve_process_group(name).size()

    def sent(self) -> Sent:
        """Calls and payload bytes so far."""
        return {key: (calls, self.payload[key]) for key, calls in self.calls.items()}


def count_step(rank: int, setting: Setting) -> Sent:
    """What one real step of ``rank`` sends, in the process group that is there."""
    module, batch = build(setting, rank), batch_of(setting, rank)
    step(module, batch)  # FSDP2 sets itself up in the first
    with CountTraffic(module.layout) as counter:
        step(module, batch)
    return counter.sent()
