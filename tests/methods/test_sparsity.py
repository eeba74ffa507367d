"""Sparse runs: zeros stay zeros, exact resume, the dense phase, each method's own promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.masks import stored_masks
from helpers.ranks import run_ranks
from helpers.stored import stored
from helpers.tiny import losses, records, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.model import layer_names
from llmtrain.model.resolve import resolve_model
from llmtrain.parallel import World
from llmtrain.sparsity.storage import load_masks
from llmtrain.train.run import train

SLOPE = "sparsity={method: slope, granularity: '2:4', adapters_at: 1step}"
LOST = "sparsity={method: lost, density: 0.25}"
STATIC = "sparsity={density: 0.25}"
FACTORS = "model.factorized={multiple_of: 8, density_v: 0.25}"
RIGL = "sparsity={method: rigl, density: 0.25, every: 2step, end: 7step}"
# A checkpoint holds zeros outside the masks in any case; these look while the run is training.
ZERO = "hooks=[{use: 'helpers.hooks:ZeroOutside'}]"
Weights = dict[str, Tensor]


def config(folder: Path, corpus: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    short = {
        "train__duration": "8step",
        "eval__every": "8step",
        "checkpoint__every": "1step",
        "checkpoint__keep": 20,
    }
    return tiny_config(folder, corpus, **{**short, **changes})


def run(folder: Path, corpus: Path, *words: str) -> Path:
    assert main(["train", str(config(folder, corpus)), *words]) == 0
    return folder / "runs" / "tiny"


def tensors(run: Path, step: int = 8) -> Weights:
    return stored(run, step)


def kept(run: Path, step: int = 8) -> Weights:
    return stored_masks(run, step)


def outside_is_zero(run: Path, step: int) -> bool:
    stored = tensors(run, step)
    return all(
        bool((stored[f"{prefix}{name}.weight{suffix}"][~mask] == 0).all())
        for name, mask in kept(run, step).items()
        for prefix, suffix in (("model.", ""), ("optim.", ".exp_avg"), ("optim.", ".exp_avg_sq"))
    )


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("static"), corpus, STATIC, ZERO)


@pytest.fixture(scope="module")
def rigl(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("rigl"), corpus, RIGL, ZERO)


def test_weights_and_moments_outside_a_static_mask_stay_zero(static: Path) -> None:
    first, last = kept(static, 1), kept(static, 8)
    assert set(first) == set(layer_names(resolve_model(load_config(static / "config.yaml"), 257)))
    for name, mask in last.items():
        assert torch.equal(mask, first[name])
        assert int(mask.sum()) == round(0.25 * mask.numel())
    assert outside_is_zero(static, 1) and outside_is_zero(static, 8)
    stored = tensors(static)
    assert stored["hook.sparsity.blocks.0.mlp.up"].dtype == torch.uint8
    # The masked weights do learn, and so does everything dense.
    assert (stored["model.blocks.0.mlp.up.weight"][last["blocks.0.mlp.up"]] != 0).all()
    assert (stored["model.embedding.weight"] != 0).all()


def test_rigl_keeps_the_density_and_moves_at_its_steps_only(rigl: Path) -> None:
    masks = {step: kept(rigl, step) for step in range(1, 9)}
    for name in masks[1]:
        count = round(0.25 * masks[1][name].numel())
        assert all(int(masks[step][name].sum()) == count for step in masks)
    moved = [
        step
        for step in range(2, 9)
        if any((masks[step][n] != masks[step - 1][n]).any() for n in masks[1])
    ]
    # Updates 3, 5 and 7 are made with the masks of after 2, 4 and 6 updates.
    assert moved == [3, 5, 7]
    assert all(outside_is_zero(rigl, step) for step in masks)
    told = [r["text"] for r in records(rigl, "event") if "moved" in r["text"]]
    assert len(told) == 3


@pytest.mark.parametrize("words", [STATIC, RIGL], ids=["static", "rigl"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, corpus: Path, words: str, static: Path, rigl: Path
) -> None:
    whole = static if words == STATIC else rigl
    run(tmp_path, corpus, words, "train.stop_after=4step")
    parts = run(tmp_path, corpus, words)
    assert losses(parts) == losses(whole)
    ours, reference = tensors(parts), tensors(whole)
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], reference[key]) for key in ours)


def test_the_dense_phase_begins_with_exactly_the_sparse_function(
    tmp_path: Path, corpus: Path, static: Path
) -> None:
    """SPDF in one run, and as a branch of the sparse one that is dense."""
    dropped = run(tmp_path / "one", corpus, "sparsity={density: 0.25, until: 5step}")
    # The loss of step 6 is that of the weights of step 5: the sparse run's own.
    assert losses(dropped)[:5] == losses(static)[:5]
    assert losses(dropped)[5][0] == losses(static)[5][0]
    assert losses(dropped)[5][1] > losses(static)[5][1]  # all gradients count
    mask, after = kept(static), tensors(dropped)
    weight = after["model.blocks.1.mlp.down.weight"]
    assert (weight[~mask["blocks.1.mlp.down"]] != 0).float().mean() > 0.99
    # The state of the optimizer is kept: its count goes on.
    assert after["optim.blocks.1.mlp.down.weight.step"] == 8
    point = static / "checkpoints" / "step-00000005"
    other = run(tmp_path / "two", corpus, f"checkpoint.resume={point}")
    assert losses(other) == losses(dropped)[5:]


def test_a_mask_of_the_largest_weights_of_a_dense_model(
    tmp_path: Path, corpus: Path, static: Path
) -> None:
    point = static / "checkpoints" / "step-00000008"
    words = f"init={{path: '{point}'}}"
    section = "sparsity={granularity: '2:4', choose: magnitude}"
    pruned = run(tmp_path, corpus, words, section, "train.stop_after=1step")
    dense = tensors(static)["model.blocks.0.mlp.up.weight"]
    mask = kept(pruned, 1)["blocks.0.mlp.up"]
    groups, scores = mask.view(-1, 4), dense.abs().view(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert (scores.masked_fill(~groups, 9).amin(1) >= scores.masked_fill(groups, -1).amax(1)).all()


def test_masks_of_a_checkpoint_begin_another_run_and_leave_with_the_weights(
    tmp_path: Path, corpus: Path, rigl: Path
) -> None:
    words = [f"sparsity={{density: 0.25, masks: '{rigl}'}}", "train.stop_after=2step"]
    other = run(tmp_path, corpus, *words)
    masks, given = kept(other, 2), kept(rigl)
    assert all(torch.equal(masks[name], given[name]) for name in given)
    file = config(tmp_path, corpus)
    gone = [words[0].replace("runs/tiny", "nowhere"), "train.stop_after=3step"]
    assert main(["train", str(file), *gone]) == 0  # a resumed run has its own
    assert main(["convert", "to-hf", str(rigl), str(tmp_path / "hf")]) == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    exported = load_masks(tmp_path / "hf" / "masks.safetensors")
    assert len(exported) == 2 * 7
    for name, mask in exported.items():
        assert torch.equal(mask.kept, weights[name] != 0), name
    layers = list(exported.values())
    assert sum(int(m.kept.sum()) for m in layers) == sum(int(m.sum()) for m in given.values())


def test_gradual_pruning_follows_the_cubic_and_only_prunes(tmp_path: Path, corpus: Path) -> None:
    section = "sparsity={method: gradual, density: 0.2, start: 1step, end: 5step, every: 2step}"
    found = run(tmp_path, corpus, section, ZERO)
    masks = {step: kept(found, step)["blocks.0.mlp.up"] for step in range(1, 9)}
    for step, wanted in ((1, 1.0), (2, 1.0), (3, 0.2 + 0.8 * 0.125), (5, 0.2), (8, 0.2)):
        assert abs(float(masks[step].double().mean()) - wanted) < 1e-3
        assert not (masks[8] & ~masks[step]).any()
    assert all(outside_is_zero(found, step) for step in masks)


def test_slopes_adapters_sleep_until_the_end(tmp_path: Path, corpus: Path) -> None:
    words = ["sparsity={method: slope, granularity: '2:4', adapters_at: 6step}"]
    plain = run(tmp_path / "plain", corpus, *words)
    adapters = "model.adapters={rank: 2, freeze: false, targets: [mlp]}"
    lazy = run(tmp_path / "lazy", corpus, *words, adapters)
    assert losses(lazy)[:6] == losses(plain)[:6]
    # B is zero at first: the seventh loss is the same, its gradients are not.
    assert losses(lazy)[6][0] == losses(plain)[6][0] and losses(lazy)[6][1] > losses(plain)[6][1]
    asleep, awake = tensors(lazy, 6), tensors(lazy, 8)
    name = "blocks.1.mlp.down.adapter.b.weight"
    assert (asleep[f"model.{name}"] == 0).all() and (awake[f"model.{name}"] != 0).all()
    assert asleep[f"optim.{name}.step"] == 0 and awake[f"optim.{name}.step"] == 2
    assert outside_is_zero(lazy, 8)
    mask = kept(lazy, 8)["blocks.0.attention.qkv"]
    assert (mask.view(-1, 4).sum(1) == 2).all()


def test_lost_splits_the_initial_weights(tmp_path: Path, corpus: Path) -> None:
    adapters = "model.adapters={rank: 4, freeze: false}"
    hook = "hooks=[{use: 'helpers.hooks:KeepStart'}]"
    plain = run(tmp_path / "plain", corpus, hook, "train.stop_after=1step")
    section = "sparsity={method: lost, density: 0.25, gamma: 0.4}"
    lost = run(tmp_path / "lost", corpus, hook, adapters, section)
    whole, start = load_file(plain / "start.bin"), load_file(lost / "start.bin")
    for layer, masks in kept(lost).items():
        weight, b, a = (
            value.double()
            for value in (
                whole[f"{layer}.weight"],
                start[f"{layer}.adapter.b.weight"],
                start[f"{layer}.adapter.a.weight"],
            )
        )
        parts, own = len(a) // 4, start[f"{layer}.weight"].double()
        assert (masks == masks[:1]).all() and int(masks[0].sum()) == masks.shape[1] // 4
        rest = []
        for part in range(parts):
            # Rows of gate and up in turn; query heads, key and value of each group of 8 rows.
            rows = torch.arange(len(weight)) % parts == part
            if layer.endswith("qkv"):
                head = torch.arange(len(weight)) // 8 % 4
                rows = head == part + 1 if part else head < 2
            u, s, v = torch.linalg.svd(weight[rows], full_matrices=False)
            low = u[:, :4] * s[:4] @ v[:4]
            rest.append((rows, weight[rows] - low))
            product = 2.0 * b[rows] @ a[4 * part : 4 * part + 4]  # alpha / rank is 2
            torch.testing.assert_close(product, 0.4 * low, rtol=1e-4, atol=1e-6)
        residual = torch.zeros_like(weight)
        for rows, value in rest:
            residual[rows] = value
        torch.testing.assert_close(own, 0.6 * residual * masks, rtol=1e-4, atol=1e-6)
        norms = residual.norm(dim=0)
        assert norms[masks[0]].min() >= norms[~masks[0]].max()
    assert outside_is_zero(lost, 8)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("words", "parallel", "ranks"),
    [
        ([SLOPE, "model.adapters={rank: 2, freeze: false}"], ["parallel.tensor=2"], 4),
        (["sparsity={method: rigl, density: 0.25, granularity: 4x4, every: 1step}"], [], 2),
        ([LOST, "model.adapters={rank: 2, freeze: false}"], ["parallel.tensor=2"], 2),
        ([STATIC, "quantization.format=mus_fp8"], ["parallel.pipeline=2"], 2),
        ([RIGL.replace("7step", "3step"), FACTORS], ["parallel.tensor=2"], 4),
        ([STATIC, FACTORS, "quantization.format=mus_fp8"], ["parallel.tensor=2"], 2),
    ],
    ids=[
        "slope, TP2+FSDP2",
        "rigl, FSDP2",
        "lost, TP2",
        "FP8, pipeline 2",
        "factors, rigl, TP2+FSDP2",
        "factors, FP8, TP2",
    ],
)
def test_layouts_train_the_same_and_read_each_others_checkpoints(
    tmp_path: Path, corpus: Path, words: list[str], parallel: list[str], ranks: int
) -> None:
    """Two steps on several ranks, then two on one, against four on one."""
    file = config(tmp_path, corpus, train__micro_batch_size=2, train__duration="4step")
    words = [*words, "checkpoint.every=2step", "eval.every=4step"]
    assert main(["train", str(file), "name=alone", *words]) == 0
    part = load_config(file, ["name=parts", "train.stop_after=2step", *words, *parallel])

    def body(rank: int) -> int:
        return train(part, World(rank, ranks, rank, torch.device("cpu"), dist.group.WORLD))

    assert run_ranks(ranks, body) == [0] * ranks
    assert main(["train", str(file), "name=parts", *words]) == 0
    alone, parts = tmp_path / "runs" / "alone", tmp_path / "runs" / "parts"
    for (a, b), (c, d) in zip(losses(parts), losses(alone), strict=True):
        assert abs(a - c) < 3e-6 * c and abs(b - d) < 3e-5 * d
    masks = kept(alone, 4)
    assert all(torch.equal(mask, masks[name]) for name, mask in kept(parts, 4).items())
    assert outside_is_zero(parts, 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["sparsity={density: 0.5}"],
            "sparsity.density: the checkpoint's masks were made with 0.25",
        ),
        (["sparsity={granularity: '2:4'}"], "sparsity.granularity: the checkpoint's masks"),
        (
            ["sparsity={density: 0.25, rules: [{layers: ['*.mlp.up'], density: 0.5}]}"],
            "sparsity.rules: the checkpoint's masks",
        ),
    ],
)
def test_a_resumed_run_cannot_ask_for_other_masks(
    tmp_path: Path,
    corpus: Path,
    static: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    point = static / "checkpoints" / "step-00000004"
    file = config(tmp_path, corpus)
    assert main(["train", str(file), *words, f"checkpoint.resume={point}"]) == 2
    assert told in capsys.readouterr().err


def test_dry_run_says_what_is_kept_and_what_it_saves(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = "sparsity={density: 0.25, rules: [{layers: [blocks.0.*], density: 1}]}"
    assert main(["train", str(config(tmp_path, corpus)), "--dry-run", section]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "attention.qkv 1 64 x 32 dense 1 2,048",
        "attention.qkv 1 64 x 32 unstructured 0.25 512",
        "hidden 15,360 0.625 9,600 in all",
        "of the dense run's)",
        "places of kept weights 7.50 KiB",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sparsity={}"], "sparsity.density: is missing"),
        (["sparsity={method: rigl, granularity: '2:4'}"], "cannot follow method: rigl"),
        (["sparsity={method: slope, density: 0.5}"], "slope prunes N of M"),
        (["sparsity={density: 0.5, until: 99step}"], "is after the end of the run"),
        (["sparsity={method: gradual, density: 0.5, start: 1dur}"], "is not before sparsity.end"),
        (["sparsity={method: set, density: 0.5}", "average={}"], "averaged weights would not"),
        (["sparsity={method: set, density: 0.5}", "model.adapters={}"], "model.adapters freezes"),
        (["sparsity={method: slope, granularity: '2:4'}", "model.adapters={}"], "must be false"),
        (["sparsity={method: lost, density: 0.5}"], "lost needs an adapter of all of blocks.0"),
        (["sparsity={method: lost, granularity: 4x4, density: 0.5}"], "keeps whole columns"),
        (["sparsity={density: 0.5}", "parallel.engine=deepspeed"], "deepspeed"),
        (["sparsity={density: 0.5}", "model.adapters={base: int8}"], "model.adapters.base packs"),
        (["sparsity={density: 0.5, masks: nowhere}"], "nowhere cannot be read"),
        (["sparsity={density: 0.5, masks: docs}"], "sparsity.masks: docs holds no checkpoint"),
        (["sparsity={granularity: 16x16, density: 0.3}"], "cannot be met by the 8 blocks"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, corpus: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config(tmp_path, corpus)), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_sparse_products_learn_what_masked_dense_ones_do(
    tmp_path: Path, corpus: Path, static: Path
) -> None:
    ours = run(tmp_path, corpus, "sparsity={density: 0.25, products: sparse}")
    torch.testing.assert_close(losses(ours), losses(static), rtol=1e-5, atol=1e-5)
    assert outside_is_zero(ours, 8)


def test_the_log_says_which_products_a_layer_gets(
    tmp_path: Path, corpus: Path, capsys: Any
) -> None:
    run(tmp_path, corpus, STATIC, "train.duration=1step")
    line = "blocks.0.attention.qkv and 1 more (64x32 unstructured, 25% kept, float32)"
    assert f"{line}: dense products (too small to matter)" in capsys.readouterr().out
    assert main(["train", str(config(tmp_path, corpus)), STATIC, "--dry-run"]) == 0
    assert f"products of sparse layers:\n  {line}: dense" in capsys.readouterr().out


def test_sparse_products_that_cannot_run_are_refused(
    tmp_path: Path, corpus: Path, capsys: Any
) -> None:
    path = config(tmp_path, corpus)
    section = "sparsity={density: 0.25, products: sparse}"
    assert main(["train", str(path), section, "train.compile=true"]) == 2
    assert "sparsity.products: sparse: train.compile does not know" in capsys.readouterr().err


def test_a_step_that_changed_the_mask_is_judged_and_not_made_again(
    tmp_path: Path, corpus: Path
) -> None:
    hook = "hooks=[{use: 'helpers.hooks:LossNotFinite', args: {steps: [3, 4]}}]"
    where = run(tmp_path, corpus, RIGL, hook, "guard.nonfinite=skip")
    texts = {e["step"]: e["text"] for e in records(where, "event") if "suspicious" in e["text"]}
    assert "not made again" in texts[3]
    assert "not transient" in texts[4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{granularity: '4:8t', choose: magnitude}", "sparsity.granularity: 4:8t cannot be chosen"),
        ("{method: slope, granularity: '8:16'}", "does not divide the 56 outputs of"),
    ],
)
def test_masks_that_cannot_be_made_are_refused_before_the_run_begins(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    shape = ["model.d_model=48", "model.n_heads=12", "model.n_kv_heads=1"]
    assert main(["train", str(config(tmp_path, corpus)), *shape, f"sparsity={text}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_penalty_does_not_reach_beyond_the_mask(tmp_path: Path, corpus: Path) -> None:
    run(tmp_path, corpus, STATIC, "penalty={kind: l2, strength: 1.0}", ZERO, "train.duration=2step")


def test_the_dense_part_of_an_averaged_run_starts_from_zeros(tmp_path: Path, corpus: Path) -> None:
    text = "sparsity={density: 0.25, until: 4step}"
    where = run(
        tmp_path, corpus, text, "average={method: sfa, every: 2step}", "train.duration=5step"
    )
    weights = tensors(where, 4)
    for name, mask in kept(where, 3).items():
        assert not weights[f"model.{name}.weight"][~mask].any()


def test_copies_of_an_averaged_run_begin_within_the_masks(tmp_path: Path, corpus: Path) -> None:
    words = ["average={method: ema, every: 2step, replace: false}", "train.duration=3step"]
    where = run(tmp_path, corpus, STATIC, *words)
    stored = tensors(where, 1)  # before the average's first update
    for name, mask in kept(where, 1).items():
        copy = stored[f"hook.average.ema.{name}.weight"]
        assert copy[mask].any() and not copy[~mask].any()
