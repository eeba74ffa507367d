"""Optimizers against their update rules in float64, decay styles, groups, clipping."""

import math

import pytest
import torch
from torch import nn

from llmtrain.config.schema import OptimConfig
from llmtrain.errors import ConfigError
from llmtrain.optim import (
    build_groups,
    build_optimizer,
    clip_gradients,
    clipped_step,
    create_state,
    gradient_norm,
    groups_table,
    set_learning_rate,
    state_tensors,
)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(3)
    return {
        "embed": nn.Parameter(torch.randn(7, 5)),
        "block.w": nn.Parameter(torch.randn(3, 5)),
        "block.norm": nn.Parameter(torch.randn(5)),
    }


ROLES = {"embed": "embedding", "block.w": "hidden", "block.norm": "norm"}


def run(cfg: OptimConfig, steps: int = 4) -> tuple[dict[str, nn.Parameter], list]:
    params = parameters()
    optimizer = build_optimizer(build_groups(params, ROLES, cfg), cfg)
    create_state(optimizer)
    torch.manual_seed(5)
    history = []
    for step in range(steps):
        lr = cfg.lr / (step + 1)
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        history.append((lr, grads))
        for name, p in params.items():
            p.grad = grads[name].clone()
        set_learning_rate(optimizer, lr)
        optimizer.step()
    return params, history


def reference(cfg: OptimConfig, history: list) -> dict[str, torch.Tensor]:
    out = {}
    for name, start in parameters().items():
        p = start.detach().double()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        factor = cfg.lr_factors.get(ROLES[name], 1.0)
        decay = cfg.weight_decay if ROLES[name] in cfg.decay_roles else 0.0
        b1, b2 = cfg.betas
        for t, (base, grads) in enumerate(history, start=1):
            g, lr = grads[name].double(), base * factor
            shrink = lr * decay if cfg.decoupled == "lr" else decay * base / cfg.lr
            p = p * (1 - shrink)
            if cfg.name == "lion":
                p = p - lr * torch.sign(b1 * m + (1 - b1) * g)
                m = b2 * m + (1 - b2) * g
            else:
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + cfg.eps)
                p = p - lr * update
        out[name] = p
    return out


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("decoupled", ["lr", "fully"])
def test_updates_equal_the_papers_rule_in_float64(name: str, decoupled: str) -> None:
    cfg = OptimConfig(
        name=name, lr=0.02, decoupled=decoupled, weight_decay=0.3, lr_factors={"hidden": 0.5}
    )
    params, history = run(cfg)
    for key, expected in reference(cfg, history).items():
        torch.testing.assert_close(params[key].detach().double(), expected, atol=2e-6, rtol=2e-6)


def test_fully_decoupled_decay_does_not_depend_on_the_peak_rate() -> None:
    shrunk = []
    for lr in (1e-3, 1e-1):
        cfg = OptimConfig(lr=lr, decoupled="fully", weight_decay=0.25)
        params = parameters()
        optimizer = build_optimizer(build_groups(params, ROLES, cfg), cfg)
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        shrunk.append(params["block.w"].detach() / parameters()["block.w"].detach())
    torch.testing.assert_close(shrunk[0], torch.full((3, 5), 0.75))
    torch.testing.assert_close(shrunk[1], torch.full((3, 5), 0.75))


def test_groups_follow_roles_and_unknown_roles_are_refused() -> None:
    cfg = OptimConfig(weight_decay=0.1, decay_roles=["hidden"], lr_factors={"embedding": 3.0})
    groups = {g.role: g for g in build_groups(parameters(), ROLES, cfg)}
    assert groups["hidden"].weight_decay == 0.1
    assert groups["norm"].weight_decay == 0.0
    assert groups["embedding"].lr_factor == 3.0
    table = groups_table(list(groups.values()), cfg)
    assert ("embedding", "1", "35", "0.003", "0") in table
    with pytest.raises(ConfigError, match=r"optim.lr_factors.*'hiden'"):
        build_groups(parameters(), ROLES, OptimConfig(lr_factors={"hiden": 1.0}))


def test_created_state_is_what_the_first_step_would_make() -> None:
    for name in ("adamw", "lion"):
        cfg = OptimConfig(name=name)
        params = parameters()
        optimizer = build_optimizer(build_groups(params, ROLES, cfg), cfg)
        create_state(optimizer)
        early = {k: (v.shape, v.dtype) for k, v in state_tensors(optimizer, params).items()}
        fresh = build_optimizer(build_groups(params, ROLES, cfg), cfg)
        for p in params.values():
            p.grad = torch.ones_like(p)
        fresh.step()
        late = {k: (v.shape, v.dtype) for k, v in state_tensors(fresh, params).items()}
        assert early == late


def test_clipping_scales_the_whole_gradient_to_the_bound() -> None:
    params = parameters()
    for p in params.values():
        p.grad = torch.randn_like(p)
    before = {k: p.grad.clone() for k, p in params.items()}
    norm = gradient_norm(params.values())
    expected = math.sqrt(sum(float((g.double() ** 2).sum()) for g in before.values()))
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    clip_gradients(params.values(), norm, 0.5)
    for key, p in params.items():
        torch.testing.assert_close(p.grad, before[key] * (0.5 / expected))
    clip_gradients(params.values(), gradient_norm(params.values()), 10.0)
    torch.testing.assert_close(params["embed"].grad, before["embed"] * (0.5 / expected))


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("bound", [None, 0.5, 100.0])
def test_a_clipped_step_is_clipping_then_stepping(name: str, bound: float | None) -> None:
    results = []
    for together in (True, False):
        cfg = OptimConfig(name=name, lr=0.1)
        params = parameters()
        optimizer = build_optimizer(build_groups(params, ROLES, cfg), cfg)
        create_state(optimizer)
        torch.manual_seed(11)
        for _ in range(3):
            for p in params.values():
                p.grad = torch.randn_like(p)
            norm = gradient_norm(params.values())
            if together:
                clipped_step(optimizer, params.values(), norm, bound)
            else:
                if bound is not None:
                    clip_gradients(params.values(), norm, bound)
                optimizer.step()
        results.append({**params, **state_tensors(optimizer, params)})
    for key, value in results[0].items():
        torch.testing.assert_close(value.detach(), results[1][key].detach(), atol=1e-6, rtol=1e-5)


def test_full_decay_of_a_frozen_role_is_no_division_by_zero() -> None:
    cfg = OptimConfig(decoupled="fully", lr_factors={"hidden": 0.0})
    build_optimizer(build_groups(parameters(), ROLES, cfg), cfg)


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    torch.manual_seed(2)
    param = nn.Parameter(torch.zeros(4_000_000))
    param.grad = torch.randn(4_000_000)
    expected = float(param.grad.double().square().sum().sqrt())
    assert float(gradient_norm([param])) == pytest.approx(expected, rel=2e-7)
