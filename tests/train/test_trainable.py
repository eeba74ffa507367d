"""Which parameters train when: what is chosen, what moves, and that layouts and restarts agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.layout_runs import (
    Outcome,
    assert_same,
    build,
    case,
    one_step,
    outcome,
    rank_batch,
    train_steps,
)
from helpers.ranks import run_ranks
from helpers.tiny import tiny_config

from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.cli.main import main
from llmtrain.config import from_dict
from llmtrain.config.trainable import TrainableConfig
from llmtrain.errors import ConfigError
from llmtrain.methods.trainable import PartialTraining
from llmtrain.model import Trainable, complete
from llmtrain.parallel import local_boxes
from llmtrain.train.module import TrainModule

GPT2 = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}
BITFIT = {"parameters": ["bias"]}
HALF = {"half": True, "redraw": "2step"}
MATRICES = {**HALF, "half_by": "matrix"}


def plan(*rules: dict[str, Any], steps: int = 12, seed: int = 0, **model: Any) -> Trainable:
    shape = {"d_model": 16, "n_layers": 4, "n_heads": 2, "vocab_size": 50, **model}
    cfg = from_dict(
        {"seed": seed, "model": shape, "train": {"duration": f"{steps}step"}, "trainable": rules}
    )
    return Trainable(cfg, complete(cfg.model, None, 16))


def of(rule: dict[str, Any]) -> TrainableConfig:
    return from_dict({"trainable": [rule]}).trainable[0]


def test_roles_patterns_and_last_blocks() -> None:
    assert plan({"parameters": ["bias"]}, mlp_bias=True).at(0) == {
        f"blocks.{i}.mlp.{x}.bias" for i in range(4) for x in ("up", "down")
    }
    found = plan({"parameters": ["attention", "head"], "exclude": ["blocks.?.attention.out.*"]})
    attention = {f"blocks.{i}.attention.qkv.weight" for i in range(4)}
    assert found.ever() == attention | {"head.projection.weight"}
    last = plan({"last_blocks": 2, "exclude": ["norm"]}).ever()
    assert {name.split(".")[1] for name in last} == {"2", "3"} and len(last) == 8
    both = plan({"last_blocks": 1}, {"parameters": ["final_norm.*"]}).ever()
    assert "final_norm.weight" in both and len(both) == 7
    adapters = {"rank": 2, "targets": ["mlp"]}
    assert all(".adapter." in name for name in plan({}, adapters=adapters).ever())


def test_windows() -> None:
    found = plan(
        {"parameters": ["norm"], "until": "0.5dur"}, {"parameters": ["mlp"], "start": "0.25dur"}
    )
    roles = [{found.roles[name] for name in found.at(step)} for step in (0, 2, 3, 5, 6, 11)]
    assert roles == [{"norm"}] * 2 + [{"norm", "hidden"}] * 2 + [{"hidden"}] * 2


def test_halves() -> None:
    found = plan(HALF, steps=40)
    for step in range(0, 40, 2):
        now = found.at(step)
        assert now == found.at(step + 1)
        for i in range(4):
            for kind in (
                "attention.{qkv,out}.weight",
                "mlp.{up,down}.weight",
                "{attention,mlp}_norm",
            ):
                left, right = kind[kind.index("{") + 1 : kind.index("}")].split(",")
                names = [
                    kind[: kind.index("{")] + x + kind[kind.index("}") + 1 :] for x in (left, right)
                ]
                assert (
                    sum(any(n.startswith(f"blocks.{i}.{name}") for n in now) for name in names) == 1
                )
        assert {"embedding.weight", "head.projection.weight", "final_norm.weight"} <= now
    draws = {found.at(step) for step in range(0, 40, 2)}
    assert len(draws) == 20 and found.ever() == set(found.sizes)
    assert plan(HALF, steps=40, seed=1).at(0) != found.at(0)
    once = plan({"half": True})
    assert once.ever() == once.at(11) and once.ever() == found.at(0)


def test_halves_are_drawn_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows of the step before are asked for, as the hook does."""
    found, drawn = plan({**HALF, "half_by": "matrix"}, steps=40), []
    draw = found._drawn
    monkeypatch.setattr(found, "_drawn", lambda *args: drawn.append(args[2]) or draw(*args))
    for step in range(20, 30):
        found.at(step)
        found.frozen_rows(step)
        if step % 2 == 0:
            found.frozen_rows(step - 1)
    assert drawn == [10, 9, 11, 12, 13, 14]


def trained_matrices(found: Trainable, step: int, block: int) -> dict[str, set[str]]:
    """Kind -> matrices and norms of a block that train, from names and frozen rows."""
    rows = found.frozen_rows(step)
    shapes = {"attention.qkv": ["q"] * 16 + ["k"] * 8 + ["v"] * 8, "mlp.up": ["gate", "up"]}
    out: dict[str, set[str]] = {"attention": set(), "mlp": set(), "norm": set()}
    for name in found.at(step):
        before, _, layer = name.rpartition(".")[0].partition(f"blocks.{block}.")
        if before or not layer:
            continue
        if layer.endswith("norm"):
            out["norm"].add(layer)
            continue
        kind, _, matrix = layer.partition(".")
        parts = shapes.get(layer, [matrix])
        frozen = rows.get(name, (False,) * len(parts))
        for part in set(parts):
            here = {stays for stays, own in zip(frozen, parts, strict=True) if own == part}
            assert len(here) == 1
            if here == {False}:
                out[kind].add(part)
    return out


def test_halves_by_matrix() -> None:
    """Of each block 2 of q, k, v, out; 2 of gate, up, down in half of the blocks and 1 in the
    other; 1 of 2 norms: the paper's."""
    found = plan(MATRICES, steps=40, n_kv_heads=1, mlp_bias=True)
    seen: dict[str, set[str]] = {"attention": set(), "mlp": set(), "norm": set()}
    shares = []
    for step in range(0, 40, 2):
        assert found.frozen_rows(step) == found.frozen_rows(step + 1)
        blocks = [trained_matrices(found, step, i) for i in range(4)]
        assert [len(b["attention"]) for b in blocks] == [2] * 4
        assert sorted(len(b["mlp"]) for b in blocks) == [1, 1, 2, 2]
        assert [len(b["norm"]) for b in blocks] == [1] * 4
        shares.append(tuple(len(b["mlp"]) for b in blocks))
        for block in blocks:
            seen = {kind: own | block[kind] for kind, own in seen.items()}
        outside = {"embedding.weight", "head.projection.weight", "final_norm.weight"}
        assert outside <= found.at(step) - found.frozen_rows(step).keys()
        # Biases go with their rows.
        for i in range(4):
            name = f"blocks.{i}.mlp.up"
            assert (f"{name}.weight" in found.at(step)) == (f"{name}.bias" in found.at(step))
            rows = found.frozen_rows(step)
            assert rows.get(f"{name}.weight") == rows.get(f"{name}.bias")
    assert seen["attention"] == {"q", "k", "v", "out"} and seen["mlp"] == {"gate", "up", "down"}
    assert len(set(shares)) > 3 and found.ever() == set(found.sizes)
    # A quarter of the fused weights' parameters is not counted as all of them.
    (_, line), sizes = found.lines(), found.sizes
    whole = sum(sizes[name] for name in found.at(0))
    assert 0 < int(line[3].replace(",", "")) < whole


@pytest.mark.parametrize("key", ["model.adapters", "sparsity"])
def test_matrices_that_are_not_the_models_own(key: str) -> None:
    from llmtrain.config import check_config

    run: dict[str, Any] = {"model": {"d_model": 16, "n_layers": 4, "n_heads": 2}}
    run |= {"train": {"duration": "12step"}, "trainable": [MATRICES]}
    if key == "sparsity":
        run["sparsity"] = {"density": 0.5}
    else:
        run["model"]["adapters"] = {"rank": 2}
    with pytest.raises(ConfigError, match=f"half_by: matrix freezes rows .* {key} does not allow"):
        check_config(from_dict(run), for_training=False)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"parameters": ["blocks.*.mlp.dwon.*"]}, r"trainable\.0.*dwon.*blocks\.\*\.mlp\.down"),
        ({"parameters": ["bias"]}, r"'bias' matches no parameter; there are the roles embedding"),
        ({"exclude": ["adapter"]}, r"trainable\.0\.exclude: 'adapter'"),
        ({"last_blocks": 5}, "has 4 blocks, not 5"),
        ({"exclude": ["all"]}, "selects no parameter"),
        ({"start": "3step"}, "nothing trains from step 0 on"),
        ({"until": "9step"}, "nothing trains from step 9 on"),
        ({"redraw": "9step"}, "not read without half"),
        ({"half_by": "matrix"}, r"half_by: is not read without half"),
        ({"start": "5step", "until": "5step"}, "not before until"),
        ({"until": "99step"}, "after the end of the run"),
    ],
)
def test_what_cannot_be(rule: dict[str, Any], says: str) -> None:
    from llmtrain.config import check_config

    with pytest.raises(ConfigError, match=says):
        shape = {"d_model": 16, "n_layers": 4, "n_heads": 2, "vocab_size": 50}
        run = {"model": shape, "train": {"duration": "12step"}, "trainable": [rule]}
        check_config(from_dict(run), for_training=False)
        plan(rule)


def grads(module: TrainModule) -> dict[str, torch.Tensor]:
    module.forward_backward(rank_batch(module, 0), 3.0, 2)
    return {n: p.grad.clone() for n, p in module.params.items() if p.grad is not None}


@pytest.mark.parametrize(
    "rule",
    [
        BITFIT,
        {"parameters": ["norm", "bias"], "last_blocks": 2},
        {"parameters": ["mlp"], "exclude": ["*.up.*"]},
        {"parameters": ["embedding"]},
        {"half": True},
    ],
)
def test_gradients_are_those_of_full_training(rule: dict[str, Any]) -> None:
    what = case(**GPT2)
    full = grads(build(0, 1, what, {}))
    module = build(0, 1, dataclasses.replace(what, trainable=(of(rule),)), {})
    some = grads(module)
    assert some.keys() == Trainable(module.cfg, module.model_cfg).at(0) < full.keys()
    for name, grad in some.items():
        torch.testing.assert_close(grad, full[name], atol=1e-7, rtol=1e-5, msg=name)
    named = {
        name.split(".", 1)[1].rsplit(".", 1)[0] for name in module.tensors() if "optim" in name
    }
    assert named == some.keys()


def few_steps(
    rank: int, world: int, rules: list[dict[str, Any]], layout: dict[str, Any]
) -> Outcome:
    """Seven updates with weight decay, each of what the rules say."""
    what = dataclasses.replace(case(**GPT2, tie_embeddings=True), trainable=tuple(map(of, rules)))
    module = build(rank, world, what, layout)
    chosen, steps = Trainable(module.cfg, module.model_cfg), []
    streak: dict[str, int] = {}
    for step in range(7):
        before = {n: p.detach().clone() for n, p in module.params.items()}
        module.train_only(chosen.at(step))
        steps.append(one_step(module, step))
        for name, param in module.params.items():
            local = [x.to_local() if hasattr(x, "to_local") else x for x in (param, before[name])]
            if name in chosen.at(step):
                assert not local[0].numel() or not torch.equal(*local), name
                streak[name] = streak.get(name, 0) + 1
                assert float(module.optimizer.state[param]["step"]) == streak[name]
            else:
                assert torch.equal(*local), name
                streak[name] = 0
                assert param not in module.optimizer.state and param.grad is None
    return outcome(module, steps)


@pytest.mark.dist
def test_layouts_agree_while_halves_change() -> None:
    alone = few_steps(0, 1, [HALF], {})
    for ours in run_ranks(4, lambda rank: few_steps(rank, 4, [HALF], {"tensor": 2})):
        assert_same(ours, alone)
    whole: dict[str, torch.Tensor] = {}
    for ours in run_ranks(2, lambda rank: few_steps(rank, 2, [HALF], {"pipeline": 2})):
        assert ours.losses == pytest.approx(alone.losses, rel=2e-6)
        assert ours.norms == pytest.approx(alone.norms, rel=2e-6)
        whole |= ours.weights
    for name, value in alone.weights.items():
        torch.testing.assert_close(whole[name], value, atol=2e-5, rtol=0, msg=name)


def frozen_part(param: torch.Tensor, pattern: tuple[bool, ...]) -> torch.Tensor:
    """Which rows of this rank's part are frozen."""
    ((local, offset),) = local_boxes(param)
    return torch.tensor([pattern[(offset[0] + i) % len(pattern)] for i in range(len(local))])


def few_steps_by_matrix(
    rank: int, world: int, layout: dict[str, Any], optimizer: str = "adamw", steps: int = 5
) -> Outcome:
    """Updates with weight decay through the hook itself; frozen rows stay to the bit."""
    optim = (("name", optimizer), ("weight_decay", 0.3), ("decay_roles", ["hidden", "bias"]))
    what = dataclasses.replace(case(**GPT2), trainable=(of(MATRICES),), optim=optim)
    module = build(rank, world, what, layout)
    trainer: Any = SimpleNamespace(cfg=module.cfg, module=module, step_done=0)
    hook = PartialTraining(module.cfg.trainable)
    hook.on_run_start(trainer)
    chosen, made = Trainable(module.cfg, module.model_cfg), []
    streak: dict[str, int] = {}
    last: dict[str, Any] = {}
    for step in range(steps):
        before = {n: local_boxes(p)[0][0].clone() for n, p in module.params.items()}
        trainer.step_done = step
        batch = rank_batch(module, step)
        hook.before_batch(trainer, batch)
        (weight,) = module.layout.world.sum([module.token_weight(batch)])
        sums = module.forward_backward(batch, weight, 2)
        hook.after_backward(trainer)
        norm = module.gradient_norm()
        (loss,) = module.layout.world.sum([float(sums.loss)])
        made.append((loss, float(norm)))
        module.update(norm, module.cfg.optim.lr)
        rows = chosen.frozen_rows(step)
        assert rows
        for name, param in module.params.items():
            after = local_boxes(param)[0][0]
            now = rows.get(name) if name in chosen.at(step) else "frozen"
            streak[name] = streak.get(name, 0) + 1 if now == last.get(name, now) else 1
            last[name] = now
            if optimizer == "adamw" and now != "frozen":
                assert float(module.optimizer.state[param]["step"]) == streak[name]
            if name not in chosen.at(step):
                assert torch.equal(after, before[name]), name
            elif name in rows:
                stays = frozen_part(param, rows[name])
                same = (after == before[name]).reshape(len(after), -1).all(1)
                assert torch.equal(same, stays), name
                state = local_boxes(module.optimizer.state[param]["exp_avg"])[0][0]
                assert not state[stays].any()
                assert stays.all() or state[~stays].any()
    return outcome(module, made)


def test_frozen_rows_stay_under_lion_and_are_no_part_of_the_norm() -> None:
    ours = few_steps_by_matrix(0, 1, {}, "lion", 3)
    (first,) = train_steps(0, 1, case(steps=1, **GPT2), {}).norms
    assert ours.norms[0] < first


@pytest.mark.dist
def test_layouts_agree_while_halves_by_matrix_change() -> None:
    alone = few_steps_by_matrix(0, 1, {})
    for ours in run_ranks(4, lambda rank: few_steps_by_matrix(rank, 4, {"tensor": 2})):
        assert_same(ours, alone)
    whole: dict[str, torch.Tensor] = {}
    for ours in run_ranks(2, lambda rank: few_steps_by_matrix(rank, 2, {"pipeline": 2})):
        assert ours.losses == pytest.approx(alone.losses, rel=2e-6)
        assert ours.norms == pytest.approx(alone.norms, rel=2e-6)
        whole |= ours.weights
    for name, value in alone.weights.items():
        torch.testing.assert_close(whole[name], value, atol=2e-5, rtol=0, msg=name)


@pytest.mark.dist
def test_a_pipeline_stage_without_anything_to_train_is_refused() -> None:
    def body(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            few_steps(rank, 2, [{"last_blocks": 1}], {"pipeline": 2})
        return str(caught.value)

    assert all("pipeline stage 0" in text for text in run_ranks(2, body))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {k: read_tensor(folder, k, v) for k, v in read_layout(folder).items()}


@pytest.mark.parametrize("by", ["layer", "matrix"])
def test_a_run_that_is_broken_off_ends_with_the_same_bits(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    changes: dict[str, Any] = {
        "train__duration": "8step", "checkpoint__every": "3step", "eval__every": None,
    }  # fmt: skip
    # At the break the one is in a round, the other between two.
    half = {"half": True, "half_by": by}
    within = {**half, "redraw": "2step", "exclude": ["attention"]}
    between = {**half, "redraw": "3step", "parameters": ["attention"]}
    rules = [within, between, {"parameters": ["norm"], "until": "3step"}]
    file = tiny_config(tmp_path, corpus, **changes)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "trainable": rules}))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert f"half by {by}, anew every 2 steps" in capsys.readouterr().out
    assert main(["train", str(file)]) == 0
    straight = weights(tmp_path / "runs" / "tiny", 8)
    assert main(["train", str(file), "name=again", "train.stop_after=3step"]) == 0
    at_three = weights(tmp_path / "runs" / "again", 3)
    assert main(["train", str(file), "name=again"]) == 0
    resumed = weights(tmp_path / "runs" / "again", 8)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    optim = {k.removeprefix("optim.").rpartition(".")[0] for k in at_three if k[0] == "o"}
    assert 0 < len(optim) < sum(key[0] == "m" for key in at_three)
