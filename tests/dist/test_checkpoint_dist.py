"""Checkpoints over ranks: any layout to any layout, one file of every piece, shared failures."""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankError, run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from llmtrain.checkpoint import (
    Checkpointer,
    export_model,
    latest,
    load_checkpoint,
    safefile,
    scan,
    verify,
)
from llmtrain.checkpoint.layout import read_layout
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError

pytestmark = pytest.mark.dist
SYNC = CheckpointConfig(asynchronous=False, keep=2)
ASYNC = CheckpointConfig(asynchronous=True, keep=2)
State = dict[str, torch.Tensor]


def reference() -> State:
    """The global tensors: odd sizes, fewer rows than ranks, scalars, narrow dtypes."""
    g = torch.Generator().manual_seed(5)
    bits = torch.randint(0, 120, (6, 3), generator=g, dtype=torch.uint8)
    return {
        "model.wide.weight": torch.randn(7, 6, generator=g),
        "model.three_rows.weight": torch.randn(3, 5, generator=g),
        "model.one_row.bias": torch.randn(1, generator=g),
        "model.cube": torch.randn(5, 2, 3, generator=g).bfloat16(),
        "optim.wide.weight.exp_avg": torch.randn(7, 6, generator=g),
        "optim.wide.weight.step": torch.tensor(41.0),
        "optim.count": torch.tensor(2**40 + 1),
        "optim.long": torch.arange(9) * 2**33,
        "optim.fp8": bits.view(torch.float8_e4m3fn),
        "optim.nothing": torch.zeros(0, 4),
    }


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.clone()


@functools.cache
def _mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def _over_world(*placements: Placement) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: _distribute(value, _mesh(dist.get_world_size()), placements)


def _over_square(*placements: Placement) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: _distribute(value, _mesh(2, dist.get_world_size() // 2), placements)


def _distribute(
    value: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]
) -> torch.Tensor:
    if value.ndim == 0 or value.numel() == 0 or value.dtype.itemsize == 1:
        return value.clone()  # gloo scatters no fp8; the trainer's scalars are plain
    if value.ndim == 1:
        placements = [Shard(0) if isinstance(p, Shard) else p for p in placements]
    return distribute_tensor(value, mesh, placements)


LAYOUTS: dict[int, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    1: {"plain": _plain},
    2: {"plain": _plain, "shard": _over_world(Shard(0)), "columns": _over_world(Shard(1))},
    4: {
        "shard": _over_world(Shard(0)),
        "replicate": _over_world(Replicate()),
        "hybrid": _over_square(Replicate(), Shard(0)),
        "grid": _over_square(Shard(0), Shard(1)),
    },
}
SAVED = [f"{world}-{name}" for world, layouts in LAYOUTS.items() for name in layouts]


def _checkpointer(root: Path, cfg: CheckpointConfig = SYNC) -> Checkpointer:
    return Checkpointer(root, cfg, dist.group.WORLD if dist.is_initialized() else None)


def _save_all(rank: int, root: Path) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    for name, place in LAYOUTS[world].items():
        checkpoints = _checkpointer(root / f"{world}-{name}")
        checkpoints.save(7, {k: place(v) for k, v in reference().items()}, meta={"tokens": 70})
        checkpoints.close()


def _load_all(rank: int, root: Path) -> int:
    world = dist.get_world_size() if dist.is_initialized() else 1
    count = 0
    for place in LAYOUTS[world].values():
        wanted = {k: place(v) for k, v in reference().items()}
        state = {k: place(torch.zeros_like(v)) for k, v in reference().items()}
        for source in SAVED:
            for value in state.values():
                _local(value).zero_()
            load_checkpoint(root / source, state, dist.group.WORLD if world > 1 else None)
            for key, value in state.items():
                got, want = _local(value), _local(wanted[key])
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (source, key)
                count += 1
    return count


def _local(value: torch.Tensor) -> torch.Tensor:
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.detach().view(-1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    _save_all(0, root)
    for world in (2, 4):
        run_ranks(world, _save_all, root)
    return root


def test_every_layout_covers_every_tensor_once(saved: Path) -> None:
    for name in SAVED:
        path = latest(saved / name)
        assert path is not None and verify(path) == [], name
        layout = read_layout(path)
        assert {k: v.shape for k, v in layout.items()} == {
            k: tuple(v.shape) for k, v in reference().items()
        }
        stored = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        # Replicated tensors are stored once, so any layout takes the same room but for headers.
        data = sum(v.numel() * v.itemsize for v in reference().values())
        assert data < stored < data + 8000, name
    spread = {p.name for p in (saved / "4-replicate/step-00000007").glob("model-*")}
    assert len(spread) > 1, "replicas should share the writing"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_layout_loads_into_any_other(saved: Path, world: int) -> None:
    counts = [_load_all(0, saved)] if world == 1 else run_ranks(world, _load_all, saved)
    assert counts == [len(LAYOUTS[world]) * len(SAVED) * len(reference())] * world


def _tensor_parallel_fsdp(rank: int, root: Path, world: int) -> None:
    """Column-parallel weights under FSDP2 have (_StridedShard, Shard) placements."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    full = torch.arange(77.0).reshape(11, 7)

    def build(value: torch.Tensor) -> State:
        layer = nn.Linear(7, 11, bias=False)
        placement = [Shard(0)]
        layer.weight = nn.Parameter(distribute_tensor(value, mesh["tp"], placement))
        fully_shard(layer, mesh=mesh["dp"])
        return {"model.weight": layer.weight}

    checkpoints = _checkpointer(root)
    checkpoints.save(1, build(full))
    state = build(torch.zeros(11, 7))
    checkpoints.load(root / "step-00000001", state)
    checkpoints.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(state["model.weight"].full_tensor(), full)  # type: ignore[attr-defined]


def test_fsdp_over_tensor_parallel(tmp_path: Path) -> None:
    run_ranks(4, _tensor_parallel_fsdp, tmp_path, 4)
    state = {"model.weight": torch.zeros(11, 7)}
    load_checkpoint(tmp_path, state)
    assert torch.equal(state["model.weight"], torch.arange(77.0).reshape(11, 7))


def _train_like(rank: int, root: Path, steps: int) -> list[str]:
    """Collectives of training go on while saves are in the background."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.zeros(301, 40), mesh, [Shard(0)])
    checkpoints = _checkpointer(root, ASYNC)
    seen = []
    for step in range(1, steps + 1):
        total = torch.ones(1)
        dist.all_reduce(total)
        weight.to_local().add_(total)
        if step % 5 == 0:
            checkpoints.save(step, {"model.w": weight}, {"data.json": f"{step}"})
        if saved := checkpoints.poll():
            seen.append(saved.path.name)
    last = checkpoints.wait()
    seen += [last.path.name] if last else []
    checkpoints.close()
    return seen


def test_asynchronous_saves_hold_the_step_they_were_asked_for(tmp_path: Path) -> None:
    results = run_ranks(2, _train_like, tmp_path, 23)
    assert results[0] == results[1]
    assert [c.path.name for c in scan(tmp_path)] == ["step-00000015", "step-00000020"]
    for step in (15, 20):
        state = {"model.w": torch.zeros(301, 40)}
        load_checkpoint(tmp_path / f"step-{step:08d}", state)
        assert torch.equal(state["model.w"], torch.full((301, 40), 2.0 * step))


def _one_disk_is_full(rank: int, root: Path, asynchronous: bool) -> str:
    checkpoints = _checkpointer(root, ASYNC if asynchronous else SYNC)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"model.w": distribute_tensor(torch.ones(9, 3), mesh, [Shard(0)])}
    checkpoints.save(1, state)
    checkpoints.wait()
    if rank == 1:

        def no_space(self: object, data: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        safefile.HashingFile.write = no_space  # type: ignore[method-assign, assignment]
    message = ""
    try:
        checkpoints.save(2, state)
        checkpoints.wait()
    except CheckpointError as error:
        message = str(error)
    assert not checkpoints.busy
    checkpoints.close()
    return message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run_ranks(2, _one_disk_is_full, tmp_path, asynchronous)
    assert first == second
    for word in ("step 2", "disk is full", "step-00000001, is untouched", "rank 1 of 2"):
        assert word in first
    assert [c.path.name for c in scan(tmp_path)] == ["step-00000001"]
    assert not list(tmp_path.glob(".tmp-*"))


def _mismatch(rank: int, root: Path) -> list[str]:
    checkpoints = _checkpointer(root)
    messages = []
    for state in (
        {"model.w": torch.zeros(4, 3)},
        {"model.w": torch.zeros(9, 3), "model.new": torch.zeros(2)},
        {"model.w": torch.zeros(9, 3) if rank else torch.zeros(9, 3, dtype=torch.bfloat16)},
    ):
        try:
            checkpoints.load(root / "step-00000001", state)
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    checkpoints.close()
    return messages


def test_what_does_not_fit_is_named_on_all_ranks(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    checkpoints.save(1, {"model.w": torch.ones(9, 3)})
    checkpoints.close()
    first, second = run_ranks(2, _mismatch, tmp_path)
    assert first == second
    assert "model.w (stored [9, 3], wanted [4, 3])" in first[0]
    assert "lacks tensors this run needs: model.new" in first[1]
    assert "model.w (stored torch.float32, wanted torch.bfloat16)" in first[2]


def _disagree(rank: int, root: Path) -> None:
    _checkpointer(root).save(1, {"model.w": torch.ones(2 + rank)})


def test_ranks_that_disagree_on_a_plain_tensor_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"ranks disagree on model\.w"):
        run_ranks(2, _disagree, tmp_path)
    assert scan(tmp_path) == []


def _killed_while_saving(rank: int, root: Path) -> None:
    checkpoints = _checkpointer(root, ASYNC)
    checkpoints.save(1, {"model.w": torch.full((50, 50), 1.0)})
    checkpoints.wait()
    stuck = threading.Event()

    def never_ends(self: object) -> None:
        stuck.set()
        time.sleep(60)

    safefile.HashingFile.finish = never_ends  # type: ignore[method-assign, assignment]
    checkpoints.save(2, {"model.w": torch.full((50, 50), 2.0)})
    if rank == 0:
        stuck.wait(10)
        assert list(root.glob(".tmp-*/model-*"))
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_minus_nine_in_the_middle_of_a_save(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(2, _killed_while_saving, tmp_path)
    assert len(list(tmp_path.glob(".tmp-step-00000002-*"))) == 1
    assert [c.step for c in scan(tmp_path)] == [1]
    checkpoints = Checkpointer(tmp_path, SYNC)
    assert not list(tmp_path.glob(".tmp-*")), "the next run clears the rubbish away"
    resume = checkpoints.resolve("auto")
    assert resume.path == tmp_path / "step-00000001" and not resume.skipped
    state = {"model.w": torch.zeros(50, 50)}
    checkpoints.load(resume.path, state, verify=False)
    assert torch.equal(state["model.w"], torch.full((50, 50), 1.0))


def _damaged(rank: int, root: Path) -> tuple[str, list[str], str]:
    checkpoints = _checkpointer(root)
    resume = checkpoints.resolve("auto")
    assert resume.path is not None
    try:
        checkpoints.resolve(str(root / "step-00000003"))
        message = ""
    except CheckpointError as error:
        message = str(error)
    checkpoints.close()
    return resume.path.name, resume.skipped, message


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False, keep=5))
    for step in (1, 2, 3):
        checkpoints.save(step, {"model.w": torch.rand(40, 40), "optim.w": torch.rand(40, 40)})
    checkpoints.close()
    for name in ("step-00000003/optim-00000-of-00001.safetensors", "step-00000002/meta.json"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-5] ^= 16
        (tmp_path / name).write_bytes(data)
    first, second = run_ranks(2, _damaged, tmp_path)
    assert first == second
    name, skipped, message = first
    assert name == "step-00000001"
    assert "step-00000003/optim-00000-of-00001.safetensors" in skipped[0]
    assert "step-00000002/meta.json" in skipped[1]
    assert "optim-00000-of-00001.safetensors is damaged" in message
    assert "checkpoint.resume=" in message


def _export_live(rank: int, root: Path) -> None:
    mesh = _mesh(dist.get_world_size())
    state = {
        f"model.{key}": distribute_tensor(value, mesh, [Shard(0)])
        for key, value in reference().items()
        if value.ndim and value.dtype == torch.float32 and value.numel()
    }
    group = dist.group.WORLD
    written = export_model(state, root / "out", files={"config.yaml": b"a: 1"}, group=group)
    assert [path.name for path in written] == ["model.safetensors"]
    message = ""
    try:
        export_model(state, root / "out", group=group)
    except CheckpointError as error:
        message = str(error)
    assert "exists and is not empty" in message


def test_export_of_sharded_tensors(tmp_path: Path) -> None:
    run_ranks(2, _export_live, tmp_path)
    got = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {k: v for k, v in reference().items() if k in got}
    assert len(wanted) == 4
    assert all(torch.equal(got[k], v) for k, v in wanted.items())
    assert (tmp_path / "out" / "config.yaml").read_text() == "a: 1"
