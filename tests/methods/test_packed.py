"""Kept weights held alone: the run of weights with zeros, in every format, and out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.stored import stored
from helpers.tiny import losses, tiny_config
from torch import Tensor, nn

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.config.sparsity import SparsityConfig
from llmtrain.errors import ConfigError
from llmtrain.parallel import Degrees, World
from llmtrain.sparsity import why_dense
from llmtrain.train.laid_out import sum_over_replicas
from llmtrain.train.run import train

SHORT = {
    "train__duration": "6step",
    "train__micro_batch_size": 4,
    "eval__every": "6step",
    "checkpoint__every": "2step",
    "checkpoint__keep": 20,
}
# What fails the run where an optimizer holds zeros.
LOOK = "hooks=[{use: 'helpers.hooks:ZeroOutside'}]"


def run(folder: Path, corpus: Path, section: str, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = tiny_config(folder, corpus, **SHORT)
    assert main(["train", str(file), f"sparsity={{{section}}}", *words]) == 0
    return folder / "runs" / "tiny"


def tensors(run: Path, step: int = 6) -> dict[str, Tensor]:
    return stored(run, step)


def same(ours: Path, other: Path, step: int = 6) -> None:
    """The checkpoints of a step hold the same tensors of the same shapes, to round-off."""
    a, b = tensors(ours, step), tensors(other, step)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-5, atol=1e-6)
        if key.startswith("hook.sparsity"):
            assert torch.equal(value, b[key])


ADAPTERS = "model.adapters={rank: 2, freeze: false, targets: [mlp]}"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("density: 0.25, products: dense", [LOOK]),
        ("density: 0.3, granularity: 5x3, products: dense", [LOOK]),
        ("density: 0.25, granularity: 8x3, products: sparse", [LOOK]),
        ("granularity: '2:4t'", ["optim.name=lion", "optim.lr=3e-4", "optim.clip_norm=0.1"]),
        ("method: slope, granularity: '2:4', adapters_at: 3step", [ADAPTERS]),
        ("density: 0.25", ["quantization={format: mus_fp8, until: 3step}"]),
        (
            "density: 0.25, products: sparse",
            ["model.scaling={parametrization: mus, residual: sum}"],
        ),
        ("density: 0.5", ["model.adapters={rank: 2, kind: dora}", "train.recompute=full"]),
        ("density: 0.5, products: sparse", ["model.adapters={rank: 2, kind: dora}"]),
    ],
    ids=["single", "blocks", "tiles", "lion", "slope", "fp8", "scaled", "dora", "dora, tiles"],
)
def test_the_run_is_the_one_of_weights_with_zeros(
    tmp_path: Path, corpus: Path, section: str, words: list[str]
) -> None:
    packed = run(tmp_path / "packed", corpus, f"{section}, storage: packed", *words)
    dense = run(tmp_path / "dense", corpus, f"{section}, storage: dense", *words)
    torch.testing.assert_close(losses(packed), losses(dense), rtol=1e-5, atol=1e-6)
    same(packed, dense)


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_the_dense_part_goes_on_with_weights_and_moments(
    tmp_path: Path, corpus: Path, products: str
) -> None:
    section = f"density: 0.25, products: {products}, until: 3step"
    packed = run(tmp_path / "packed", corpus, f"{section}, storage: packed")
    dense = run(tmp_path / "dense", corpus, f"{section}, storage: dense")
    torch.testing.assert_close(losses(packed), losses(dense), rtol=1e-5, atol=1e-6)
    same(packed, dense)
    assert (tensors(packed)["model.blocks.0.mlp.up.weight"] != 0).float().mean() > 0.99


def test_a_checkpoint_goes_on_packed_or_dense_and_the_same_bit_for_bit(
    tmp_path: Path, corpus: Path
) -> None:
    section = "density: 0.25, granularity: 4x4, products: sparse"
    whole = run(tmp_path / "whole", corpus, section)
    run(tmp_path / "parts", corpus, section, "train.stop_after=2step")
    parts = run(tmp_path / "parts", corpus, section)
    assert losses(parts) == losses(whole)
    ours, reference = tensors(parts), tensors(whole)
    assert all(torch.equal(ours[key], reference[key]) for key in reference)
    point = whole / "checkpoints" / "step-00000004"
    words = [f"checkpoint.resume={point}"]
    zeros = run(tmp_path / "zeros", corpus, f"{section}, storage: dense", *words)
    torch.testing.assert_close(losses(zeros), losses(whole)[4:], rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_replicas_hold_kept_weights_alone_and_train_the_same(tmp_path: Path, corpus: Path) -> None:
    """Four steps on two replicas, masks dropped in between, then two on one process."""
    section = "sparsity={density: 0.25, granularity: 4x4, products: sparse, until: 3step"
    alone = run(tmp_path / "alone", corpus, section.removeprefix("sparsity={"))
    file = tiny_config(tmp_path, corpus, **SHORT)
    words = [f"{section}, storage: packed}}", "parallel.replicate=2", "train.stop_after=4step"]
    cfg = load_config(file, [*words, "train.verify_replicas=1step"])

    def body(rank: int) -> int:
        return train(cfg, World(rank, 2, rank, torch.device("cpu"), dist.group.WORLD))

    assert run_ranks(2, body) == [0, 0]
    assert main(["train", str(file), f"{section}}}"]) == 0
    parts = tmp_path / "runs" / "tiny"
    torch.testing.assert_close(losses(parts), losses(alone), rtol=1e-5, atol=1e-6)
    same(parts, alone, 2)


@pytest.mark.dist
def test_replicas_add_their_gradients_up_at_once() -> None:
    """One reduction for all weights; what has no gradient has none afterwards."""

    def body(rank: int) -> tuple[list[Tensor | None], int]:
        params = [nn.Parameter(torch.zeros(n)) for n in (5, 3, 7)]
        for i in (0, 2):
            params[i].grad = torch.arange(len(params[i])) + 10.0 * rank
        state = SimpleNamespace(get_group={"replicate": dist.group.WORLD}.get)
        calls, real = [], dist.all_reduce
        dist.all_reduce = lambda x, **rest: calls.append(x) or real(x, **rest)
        sum_over_replicas(params, SimpleNamespace(state=state))  # type: ignore[arg-type]
        return [p.grad for p in params], len(calls)

    for grads, calls in run_ranks(2, body):
        assert calls == 1 and grads[1] is None
        for grad in (grads[0], grads[2]):
            assert torch.equal(grad, 2.0 * torch.arange(len(grad)) + 10)


def test_saving_at_once_writes_what_saving_behind_does(tmp_path: Path, corpus: Path) -> None:
    behind = run(tmp_path / "behind", corpus, "density: 0.25", "train.stop_after=2step")
    words = ["checkpoint.asynchronous=false", "train.stop_after=2step"]
    at_once = run(tmp_path / "once", corpus, "density: 0.25", *words)
    a, b = tensors(behind, 2), tensors(at_once, 2)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sparsity={method: rigl, density: 0.5, storage: packed}"], "rigl changes the mask"),
        (["sparsity={density: 0.5, storage: packed}", "average={}"], "average keeps copies"),
        (["sparsity={density: 0.5, storage: packed}", "penalty={}"], "penalty keeps an anchor"),
        (["sparsity={density: 0.5, storage: packed}", "train.compile=true"], "train.compile"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["train", str(tiny_config(tmp_path, corpus)), *words]) == 2
    error = capsys.readouterr().err
    assert "sparsity.storage: packed: " in error and told in error and "use auto" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("density: 0.25", "are stored kept weights alone, moments for them only"),
        ("density: 0.25, storage: dense", "are stored with their zeros (as sparsity.storage says)"),
        ("method: set, density: 0.25", "are stored with their zeros (set changes the mask)"),
    ],
)
def test_dry_run_says_how_they_are_stored(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], section: str, told: str
) -> None:
    file = tiny_config(tmp_path, corpus, **SHORT)
    assert main(["train", str(file), "--dry-run", f"sparsity={{{section}}}"]) == 0
    assert f"sparse layers {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "words", "told"),
    [
        ("method: srste, granularity: '2:4'", [], "dense (srste needs whole gradients)"),
        ("density: 0.25", ["train.compile=true"], "dense (train.compile does not know"),
        ("density: 0.25", ["quantization={}"], "layers in another number format, as long as"),
    ],
)
def test_dry_run_knows_where_products_are_dense_whatever_is_faster(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    words: list[str],
    told: str,
) -> None:
    file = tiny_config(tmp_path, corpus, **SHORT)
    assert main(["train", str(file), "--dry-run", f"sparsity={{{section}}}", *words]) == 0
    assert told in capsys.readouterr().out
    asked = f"sparsity={{{section}, products: sparse}}"
    for more in ([], ["--dry-run"]):
        assert main(["train", str(file), *more, asked, *words]) == 2
        assert "sparsity.products: sparse: " in capsys.readouterr().err


@pytest.mark.parametrize("shared", ["pipeline", "shard", "context", "tensor"])
def test_ranks_that_share_matrices_hold_zeros(shared: str) -> None:
    cfg = RunConfig(sparsity=SparsityConfig(density=0.5))
    degrees = replace(Degrees(replicate=2), **{shared: 2})
    assert "ranks share each matrix" in str(why_dense(cfg, degrees, True))
    assert why_dense(cfg, Degrees(replicate=2), True) is None
    asked = replace(cfg, sparsity=SparsityConfig(density=0.5, storage="packed"))
    with pytest.raises(ConfigError, match="ranks share each matrix"):
        why_dense(asked, degrees, True)
