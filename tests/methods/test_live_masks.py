"""SR-STE and movement pruning against their formulas, replayed in float64, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.masks import stored_masks
from helpers.ranks import run_ranks
from helpers.stored import stored
from helpers.tiny import losses, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.eval.loading import load_trained
from llmtrain.methods.movement import score_gradient
from llmtrain.parallel import World
from llmtrain.train.run import train

SHORT = {
    "train__duration": "6step",
    "eval__every": "6step",
    "checkpoint__every": "1step",
    "checkpoint__keep": 20,
    "optim__weight_decay": 0.0,
}
SRSTE = "sparsity={method: srste, granularity: '2:4', decay_pruned: 0.05}"
MOVEMENT = (
    "sparsity={method: movement, granularity: 4x4, density: 0.25, start: 1step, end: 5step, "
    "every: 1step}"
)
SOFT = (
    "sparsity={method: movement, density: 0.5, threshold: 0.4995, score_decay: 1, "
    "score_rate: 40, start: 0step, end: 4step, every: 1step}"
)
# Gradients as they reach the optimizer, by step.
KEEP = "hooks=[{use: 'helpers.hooks:KeepGradients'}]"


def run(folder: Path, corpus: Path, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    assert main(["train", str(tiny_config(folder, corpus, **SHORT)), *words]) == 0
    return folder / "runs" / "tiny"


def tensors(run: Path, step: int = 6) -> dict[str, Tensor]:
    return stored(run, step)


def kept(run: Path, step: int = 6) -> dict[str, Tensor]:
    return stored_masks(run, step)


def largest_of_groups(weight: Tensor) -> Tensor:
    ranks = weight.abs().view(-1, 4).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (ranks < 2).view_as(weight)


@pytest.fixture(scope="module")
def srste(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("srste"), corpus, SRSTE, KEEP)


@pytest.fixture(scope="module")
def movement(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("movement"), corpus, MOVEMENT, KEEP)


def test_srste_masks_follow_the_magnitudes_and_what_is_pruned_decays(
    srste: Path, tmp_path: Path, corpus: Path
) -> None:
    plain = run(tmp_path, corpus, SRSTE.replace("0.05", "0.0"), KEEP, "train.stop_after=1step")
    start = load_file(srste / "gradients-1.bin")
    for name, mask in kept(srste, 1).items():
        weight = start[f"before.{name}.weight"]
        assert torch.equal(mask, largest_of_groups(weight))
        # Both runs begin alike: the gradients differ by the decay of what is pruned alone.
        straight = load_file(plain / "gradients-1.bin")[f"{name}.weight"]
        assert straight[~mask].abs().min() > 0
        wanted = straight + 0.05 * weight * ~mask
        torch.testing.assert_close(start[f"{name}.weight"], wanted)
    weights = tensors(srste, 5)
    for name, mask in kept(srste, 6).items():
        # The mask of update 6 is that of the weights of after 5; what is pruned lived until then.
        before = weights[f"model.{name}.weight"]
        assert torch.equal(mask, largest_of_groups(before)) and before[~mask].abs().min() > 0
        assert not tensors(srste)[f"model.{name}.weight"][~mask].any()


def test_movement_scores_are_summed_products_and_the_largest_stay(movement: Path) -> None:
    scores: dict[str, Tensor] = {}
    for step in range(1, 6):
        seen = load_file(movement / f"gradients-{step}.bin")
        stored, masks = tensors(movement, step), kept(movement, step)
        olds = kept(movement, step - 1) if step > 1 else masks
        for name, mask in masks.items():
            weight = seen[f"before.{name}.weight"].double()
            product = seen[f"whole.{name}.weight"].double() * weight
            high, wide = (n // 4 for n in product.shape)
            sums = product.view(high, 4, wide, 4).sum((1, 3))
            scores[name] = scores.get(name, torch.zeros_like(sums)) - sums
            found = stored[f"hook.sparsity.scores.{name}"]
            torch.testing.assert_close(found, scores[name].float(), rtol=1e-4, atol=1e-6)
            share = 1.0 if step == 1 else 0.25 + 0.75 * (1 - (step - 1) / 4) ** 3
            blocks = mask[::4, ::4]
            assert int(blocks.sum()) == round(share * blocks.numel())
            if not blocks.all():
                assert found[blocks].min() >= found[~blocks].max()
            if step > 1:  # gradients of what this update had pruned are zero
                assert not seen[f"{name}.weight"][~olds[name]].any()
    outside = ~kept(movement, 5)["blocks.0.mlp.up"]
    assert not tensors(movement, 5)["model.blocks.0.mlp.up.weight"][outside].any()
    assert tensors(movement, 4)["model.blocks.0.mlp.up.weight"].abs().min() > 0


@pytest.mark.parametrize("which", ["srste", "movement"])
def test_a_checkpoint_is_read_and_exported_as_the_run_computed(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Path = request.getfixturevalue(which)
    point = made / "checkpoints" / "step-00000003"
    stored = tensors(made, 3)
    weights = load_trained(point, torch.device("cpu")).model.state_dict()
    assert main(["convert", "to-hf", str(point), str(tmp_path / "hf")]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, mask in kept(made, 3).items():
        weight = stored[f"model.{name}.weight"]
        assert 0.2 < mask.float().mean() < 0.9 and weight[~mask].abs().min() > 0
        assert torch.equal(weights[f"{name}.weight"], weight * mask)
        if name.endswith("mlp.down"):
            layer = name.split(".")[1]
            assert torch.equal(
                exported[f"model.layers.{layer}.mlp.down_proj.weight"], weight * mask
            )


def test_soft_movement_keeps_what_is_above_the_threshold(tmp_path: Path, corpus: Path) -> None:
    soft = run(tmp_path, corpus, SOFT, KEEP)
    seen, old = load_file(soft / "gradients-2.bin"), tensors(soft, 1)
    for name in kept(soft, 2):  # the penalty of update 2 has come a quarter of its way
        product = seen[f"whole.{name}.weight"].double() * seen[f"before.{name}.weight"].double()
        before = old[f"hook.sparsity.scores.{name}"].double()
        share = before.sigmoid()
        pull = (1 - 0.75**3) * share * (1 - share) / share.numel()
        found = tensors(soft, 2)[f"hook.sparsity.scores.{name}"].double()
        torch.testing.assert_close(found, before - 40 * (product + pull), rtol=1e-4, atol=1e-7)
    for step in (2, 4):
        stored = tensors(soft, step)
        for name, mask in kept(soft, step).items():
            above = stored[f"hook.sparsity.scores.{name}"].sigmoid() > 0.4995
            assert torch.equal(mask, above)
    assert 0 < float(torch.cat([m.flatten() for m in kept(soft).values()]).float().mean()) < 1


def test_the_gradient_of_a_score_is_that_of_its_penalty_too() -> None:
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    (7.0 * scores.sigmoid().mean()).backward()
    product = torch.randn(5, 7, generator=gen)
    found = score_gradient(product, scores.detach().float(), (3, 3), 7.0)
    assert scores.grad is not None
    sums = torch.stack(
        [product[r : r + 3, c : c + 3].sum() for r in (0, 3) for c in (0, 3, 6)]
    ).view(2, 3)
    torch.testing.assert_close(found, sums + scores.grad.float())


def test_a_step_that_is_skipped_teaches_the_scores_nothing(tmp_path: Path, corpus: Path) -> None:
    fault = "hooks=[{use: 'helpers.hooks:LossNotFinite', args: {steps: [3]}}]"
    made = run(tmp_path, corpus, MOVEMENT, fault, "guard.nonfinite=skip", "train.stop_after=4step")
    one, two, three = (tensors(made, step) for step in (2, 3, 4))
    for name in kept(made, 2):
        key = f"hook.sparsity.scores.{name}"
        assert torch.equal(one[key], two[key]) and not torch.equal(two[key], three[key])
        assert torch.isfinite(three[key]).all()


@pytest.mark.parametrize(
    ("words", "stop"),
    [(SRSTE, 3), (MOVEMENT, 3), (MOVEMENT, 5)],
    ids=["srste", "movement", "movement, settled"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, corpus: Path, words: str, stop: int, srste: Path, movement: Path
) -> None:
    whole = srste if words == SRSTE else movement
    run(tmp_path, corpus, words, f"train.stop_after={stop}step")
    parts = run(tmp_path, corpus, words)
    assert losses(parts) == losses(whole)
    ours, reference = tensors(parts), tensors(whole)
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], reference[key]) for key in ours)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("words", "parallel", "ranks"),
    [(SRSTE, [], 2), (MOVEMENT, ["parallel.tensor=2"], 4)],
    ids=["srste, FSDP2", "movement, TP2+FSDP2"],
)
def test_layouts_train_the_same(
    tmp_path: Path,
    corpus: Path,
    words: str,
    parallel: list[str],
    ranks: int,
    srste: Path,
    movement: Path,
) -> None:
    """Three steps on several ranks, then three on one, against six on one."""
    file = tiny_config(tmp_path, corpus, **SHORT)
    cfg = load_config(file, [words, "train.stop_after=3step", *parallel])

    def body(rank: int) -> int:
        return train(cfg, World(rank, ranks, rank, torch.device("cpu"), dist.group.WORLD))

    assert run_ranks(ranks, body) == [0] * ranks
    assert main(["train", str(file), words]) == 0
    whole = srste if words == SRSTE else movement
    parts = tmp_path / "runs" / "tiny"
    for (a, b), (c, d) in zip(losses(parts), losses(whole), strict=True):
        assert abs(a - c) < 3e-6 * c and abs(b - d) < 3e-5 * d
    masks = kept(whole)
    assert all(torch.equal(mask, masks[name]) for name, mask in kept(parts).items())


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("method: srste, density: 0.5", "srste keeps N of M, not unstructured"),
        ("method: movement, granularity: '2:4'", "cannot follow method: movement"),
        ("method: movement, density: 0.5, start: 0.8dur", "is not before sparsity.end"),
        ("method: movement, density: 0.5, score_decay: 1", "set sparsity.threshold"),
        ("method: movement, density: 0.5, products: sparse", "movement needs whole gradients"),
        ("method: srste, granularity: '4:8t'", "cannot be chosen by magnitude"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, corpus: Path, section: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_config(tmp_path, corpus, **SHORT)
    assert main(["train", str(file), f"sparsity={{{section}}}"]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()
