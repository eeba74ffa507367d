"""Tensor parallelism of a decoder: its parameters become parts of DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.model.resolve import padded_vocab


def check_tensor_degree(cfg: ModelConfig, degree: int) -> None:
    """Raise ConfigError naming the first key of a resolved ``cfg`` that ``degree`` does not fit."""
    assert cfg.n_kv_heads is not None and cfg.d_ff is not None and cfg.d_head is not None
    if degree == 1:
        return
    kv, vocab = cfg.n_kv_heads, padded_vocab(cfg)
    if cfg.n_heads % degree:
        _refuse("model.n_heads", cfg.n_heads, degree)
    if kv % degree and degree % kv:
        raise ConfigError(
            f"parallel.tensor: {degree} ranks cannot share model.n_kv_heads {kv}; "
            "one must divide the other"
        )
    if degree > kv and (cfg.n_heads // kv + 2) * cfg.d_head % (degree // kv):
        _refuse("model.d_head", cfg.d_head, degree // kv)
    if cfg.d_ff % degree:
        _refuse("model.d_ff", cfg.d_ff, degree)
    if vocab % degree:
        raise ConfigError(
            f"model.vocab_multiple: the padded vocabulary ({vocab}) is not a multiple of "
            f"parallel.tensor {degree}; set it to a multiple of {degree}"
        )
    if cfg.qk_norm == "full" and cfg.norm != "rmsnorm":
        raise ConfigError("parallel.tensor: qk_norm full over split heads needs model.norm rmsnorm")


def _refuse(key: str, value: int, degree: int) -> None:
    raise ConfigError(
        f"{key}: {value} is not a multiple of {degree}, which parallel.tensor calls for; "
        "change one of them"
    )


def tensor_placements(model: nn.Module) -> dict[str, TensorPlacement]:
    """Placement on the tensor dimension of every parameter, as its module declares it."""
    return {full: owner.tensor_placement(name) for full, owner, name in _owned(model)}


def partial_parameters(model: nn.Module) -> list[str]:
    """Replicated parameters of which each tensor rank forms one summand of the gradient."""
    return [full for full, owner, name in _owned(model) if owner.tensor_partial(name)]


def _owned(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Full name, owning module and own name of every parameter."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield (f"{prefix}.{name}" if prefix else name), module, name


def shard_over_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace every parameter by a DTensor over the one-dimensional ``mesh``, in place.

    Each rank keeps its part of what it holds now (on the meta device: of nothing). Nothing is
    communicated. Tied parameters are one parameter of one module, so they stay tied.
    """
    placements = tensor_placements(model)
    for name, param in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        part = own_part(param.detach(), placements[name], mesh.get_local_rank(), mesh.size())
        whole = DTensor.from_local(
            part,
            mesh,
            [placements[name]],
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
        trains = param.requires_grad
        setattr(model.get_submodule(owner), leaf, nn.Parameter(whole, trains))


def keep_own_parts(model: nn.Module, rank: int, size: int) -> None:
    """Replace every parameter by this rank's part as a plain tensor, in place.

    What ``shard_over_tensor`` does for those who cannot hold DTensors: partial gradients
    (``partial_parameters``) are then theirs to sum.
    """
    placements = tensor_placements(model)
    for name, param in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        part = own_part(param.detach(), placements[name], rank, size)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(part, param.requires_grad))


def own_part(param: Tensor, placement: TensorPlacement, rank: int, size: int) -> Tensor:
    """This rank's part of a whole parameter. Dimensions split evenly (``check_tensor_degree``)."""
    if not isinstance(placement, Shard):
        return param
    assert param.shape[placement.dim] % size == 0
    return param.chunk(size, placement.dim)[rank].contiguous()
