"""Parametrisations: their factors, and unit variance at initialisation with unit scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig, OptimConfig
from llmtrain.linear import Linear
from llmtrain.model import Decoder, build_model, complete, param_roles, rate_factors
from llmtrain.model.scaling import decay_factor, residual_weights, scaling_table, tau_by_depth
from llmtrain.ops import causal_attention, sqrt_attention
from llmtrain.optim import build_groups, build_optimizer

VOCAB = 509
MUS = {"parametrization": "mus", "tau": 0.4}


def _config(scaling: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    shape: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4}
    shape |= {"norm": "layernorm", "norm_placement": "post_branch", "activation": "gelu"}
    cfg = ModelConfig(**{**shape, **keys}, scaling=ScalingConfig(**(scaling or {})))
    return complete(cfg, None, 64)


def _model(cfg: ModelConfig, seed: int = 0) -> Decoder:
    return build_model(cfg, seed=seed, device="cpu", compute_dtype=torch.float32)


def _linears(model: nn.Module) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_factors_of_unit_scaling(width: int) -> None:
    """2502.05967, table 2: hidden 1/sqrt(fan_in) forward and sqrt(d_base / d) on the rate."""
    cfg = _config(MUS, d_model=width, d_ff=3 * width)
    with torch.device("meta"):
        model = Decoder(cfg)
    scales = {name.split(".", 2)[-1]: m.plan.scale for name, m in _linears(model).items()}
    assert scales["attention.qkv"] == scales["attention.out"] == pytest.approx(width**-0.5)
    assert scales["mlp.up"] == pytest.approx(width**-0.5)
    assert scales["mlp.down"] == pytest.approx((3 * width) ** -0.5)
    assert model.head.scale == scales["projection"] == pytest.approx(1 / width)
    rates = rate_factors(cfg)
    assert rates.pop("hidden") == pytest.approx((256 / width) ** 0.5)
    assert set(rates.values()) == {1.0}


@pytest.mark.parametrize("width", [64, 128, 512])
def test_factors_of_mup(width: int) -> None:
    """2203.03466, table 8, relative to the base width."""
    cfg = _config({"parametrization": "mup", "base_width": 128}, d_model=width)
    model = _model(cfg)
    ratio = width / 128
    assert {m.plan.scale for n, m in _linears(model).items() if m.role == "hidden"} == {1.0}
    assert model.head.scale == pytest.approx(1 / ratio)
    wanted = {"embedding.weight": 0.02, "head.projection.weight": 0.02}
    wanted["blocks.0.attention.qkv.weight"] = 0.02 / ratio**0.5
    wanted["blocks.1.mlp.down.weight"] = 0.02 / ratio**0.5 / 2
    for name, std in wanted.items():
        value = model.get_parameter(name)
        assert abs(value.std().item() / std - 1) < 6 / (2 * value.numel()) ** 0.5, name
    rates = rate_factors(cfg)
    assert rates.pop("hidden") == pytest.approx(1 / ratio)
    assert set(rates.values()) == {1.0}


def test_mup_at_its_base_width_is_the_standard() -> None:
    mup = _config({"parametrization": "mup", "base_width": 64})
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(_model(mup)(tokens), _model(_config())(tokens))
    assert set(rate_factors(mup).values()) == {1.0}


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("decoupled", ["lr", "fully"])
def test_decay_per_step_is_the_same_at_any_width(name: str, decoupled: str) -> None:
    """Without gradient signal, what is left of a weight after a step at the peak rate."""
    left = []
    for width in (64, 512):
        cfg = _config(MUS, d_model=width, n_layers=1)
        with torch.device("meta"):
            roles = param_roles(Decoder(cfg))
        optim = OptimConfig(name=name, lr=0.01, weight_decay=0.03, decoupled=decoupled)
        param = nn.Parameter(torch.ones(3))
        groups = build_groups(
            {"w": param}, {"w": roles["blocks.0.mlp.up.weight"]}, optim, rate_factors(cfg)
        )
        assert groups[0].lr_factor == pytest.approx((256 / width) ** 0.5)
        optimizer = build_optimizer(groups, optim)
        param.grad = torch.zeros(3)
        optimizer.step()
        left.append(float(param.detach()[0]))
    assert left[0] == pytest.approx(1 - 0.03 * (0.01 if decoupled == "lr" else 1.0), rel=1e-6)
    assert left[1] == pytest.approx(left[0], rel=1e-6)


def test_table_of_a_model() -> None:
    cfg = _config({**MUS, "base_width": 16})
    rows = {row[0]: row[1:] for row in scaling_table(cfg, OptimConfig(decoupled="fully"))}
    assert rows["hidden"] == ("1", "0.125 (of 64), 0.0625 (of 256)", "0.5", "1")
    assert rows["head"] == ("1", "0.01562 (of 64)", "1", "1")
    assert rows["norm"][0] == "1 (constant)" and rows["embedding"] == ("1", "1", "1", "1")
    assert decay_factor(0.5, OptimConfig(decoupled="lr")) == 2.0


@pytest.mark.parametrize(
    "scaling", [MUS, {"parametrization": "mus", "residual": "running_mean"}], ids=str
)
def test_residual_weights_keep_unit_variance(scaling: dict[str, Any]) -> None:
    cfg = _config(scaling, n_layers=9)
    for branch in range(18):
        stay, gain = residual_weights(cfg, branch)
        assert stay**2 + gain**2 == pytest.approx(1)
        if cfg.scaling.tau is not None:
            assert gain == pytest.approx(math.sqrt(0.4))
        else:  # every summand so far, the embedding among them, counts alike
            assert gain == pytest.approx(1 / math.sqrt(branch + 2))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("residual", ["fixed", "running_mean", "sum"])
def test_stream_is_the_formula(residual: str, norm: str) -> None:
    """A block against x <- a x + b norm(f(x)) from its own parts, norms not all ones."""
    tau = {"tau": 0.3} if residual == "fixed" else {}
    cfg = _config(
        {"parametrization": "mus", "residual": residual, **tau}, norm=norm, norm_bias=True
    )
    model = _model(cfg)
    block: Any = model.blocks[1]
    for seed, name in enumerate(("attention_norm", "mlp_norm")):
        for param in getattr(block, name).parameters():
            draw = torch.Generator().manual_seed(seed)
            param.data.add_(0.1 * torch.randn(param.shape, generator=draw))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    context = model._context(torch.zeros(2, 5, dtype=torch.long), None, None, None, None)
    with torch.no_grad():
        out = block(x, context)
        weights = {
            "fixed": [(0.7**0.5, 0.3**0.5)] * 2,
            "running_mean": [((3 / 4) ** 0.5, 0.5), ((4 / 5) ** 0.5, (1 / 5) ** 0.5)],
            "sum": [(1.0, 1.0)] * 2,
        }[residual]
        (a, b), (c, d) = weights
        middle = a * x + b * block.attention_norm(block.attention(x, context))
        expected = c * middle + d * block.mlp_norm(block.mlp(middle))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_interpolated_tau_meets_the_papers_values() -> None:
    assert tau_by_depth(4) == 0.4
    assert tau_by_depth(100) == pytest.approx(0.1, abs=3e-3)
    cfg = _config({"parametrization": "mus", "tau_by_depth": True}, n_layers=24)
    assert cfg.scaling.tau == pytest.approx(tau_by_depth(24)) and not cfg.scaling.tau_by_depth


def test_tied_embedding_has_the_heads_multiplier_and_the_embeddings_rate() -> None:
    cfg = _config(MUS, tie_embeddings=True)
    model = _model(cfg)
    assert model.head.scale == 1 / 64 and param_roles(model)["embedding.weight"] == "embedding"
    hidden = torch.randn(3, 64)
    with torch.no_grad():
        expected = hidden @ model.embedding.weight[:VOCAB].T / 64
        torch.testing.assert_close(model.head(hidden), expected, atol=1e-6, rtol=1e-5)


def _second_moments(model: Decoder, seed: int) -> dict[str, float]:
    """Mean square of what each part puts out, of hidden products over that of their input where
    it is not the unit stream, of branches over their share of the stream."""
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
            value = out.square().mean()
            if name.endswith(("attention.out", "mlp.down")):
                value = value / inputs[0].square().mean()
            elif name.endswith("_norm"):
                value = value / inputs[1] ** 2
            found[name] = float(value)

        return hook

    for name, module in model.named_modules():
        block = name.startswith("blocks.") and name.count(".") == 1
        if block or name.endswith(("attention_norm", "mlp_norm")) or name in _linears(model):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        model(torch.randint(0, VOCAB, (8, 12), generator=draw))
    found.pop("head.projection", None)
    return found


FIXED = {"parametrization": "mus", "tau_by_depth": True}
RUNNING = {"parametrization": "mus", "residual": "running_mean"}
# (draws, blocks, scaling, shape). One draw of narrow weights is off by about 1/sqrt(width), which
# its tokens and neighbouring layers share; so mean squares are averaged over draws, and in deep
# models over the blocks of a stretch. Wide models need one draw, and have narrow MLPs to be quick.
SHAPES: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (24, 1, FIXED, {"d_model": 128, "n_layers": 4}),
    (8, 1, FIXED, {"d_model": 256, "n_layers": 4, "activation": "swiglu"}),
    (8, 1, RUNNING, {"d_model": 256, "n_layers": 4, "norm": "rmsnorm"}),
    (4, 1, FIXED, {"d_model": 512, "n_layers": 4, "activation": "relu"}),
    (2, 1, FIXED, {"d_model": 1024, "n_layers": 2, "activation": "silu"}),
    (1, 1, FIXED, {"d_model": 2048, "n_layers": 1, "d_ff": 2048}),
    (1, 1, FIXED, {"d_model": 4096, "n_layers": 1, "d_ff": 512, "n_kv_heads": 1}),
    (8, 4, FIXED, {"d_model": 128, "n_layers": 16, "d_ff": 256}),
    (6, 8, FIXED, {"d_model": 128, "n_layers": 64, "d_ff": 128}),
    (6, 8, RUNNING, {"d_model": 128, "n_layers": 64, "d_ff": 128}),
]


@pytest.mark.parametrize(("draws", "blocks", "scaling", "shape"), SHAPES, ids=str)
def test_everything_has_unit_variance_at_the_start(
    draws: int, blocks: int, scaling: dict[str, Any], shape: dict[str, Any]
) -> None:
    """Within 3% at any width and depth: hidden products, normed branches, the stream.

    The inputs of attention.out and mlp.down (averages of values, results of an activation) have
    not unit variance themselves; these two layers keep what they get.
    """
    sums: dict[tuple[str, int], float] = {}
    for seed in range(draws):
        model = _model(_config(scaling, n_heads=shape["d_model"] // 64, **shape), seed)
        for name, value in _second_moments(model, seed).items():
            _, number, *rest = name.split(".")
            key = (".".join(rest), int(number) // blocks)
            sums[key] = sums.get(key, 0.0) + value / (draws * blocks)
    assert len(sums) == 7 * shape["n_layers"] // blocks
    off = {key: math.sqrt(value) for key, value in sums.items() if abs(value**0.5 - 1) > 0.03}
    assert not off


@pytest.mark.parametrize("width", [128, 1000, 4096])
def test_hidden_products_of_independent_unit_inputs(width: int) -> None:
    cfg = _config(MUS, d_model=width, n_layers=1, d_ff=515, n_heads=4, n_kv_heads=1)
    x = torch.Generator().manual_seed(3)
    layers = _linears(_model(cfg).blocks)
    assert len(layers) == 4
    for name, layer in layers.items():
        with torch.no_grad():
            out = layer(torch.randn(200, layer.in_features, generator=x))
        assert abs(float(out.std()) - 1) < 0.03, name


def _iid() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    for _ in range(4):
        yield tuple(torch.randn(3, 8, 520, 64, generator=draw) for _ in range(3))  # type: ignore[misc]


def _sum_of_squared_weights(keys: int, draws: int) -> float:
    """E of the sum of p^2 over ``keys`` softmax weights of independent standard normal logits,
    which is the variance of a mean of independent unit values under them."""
    logits = torch.randn(draws, keys, generator=torch.Generator().manual_seed(keys))
    return float(logits.double().softmax(-1).square().sum(-1).mean())


def test_variance_of_attention_over_independent_values() -> None:
    """Proposition 2.1: e/k - (e-1)/k^2.

    With p_i = X_i / sum X, X_i = exp of a standard normal (mean sqrt(e), variance e (e - 1)), to
    first order in X_i - E X: p_i = 1/k (1 + (X_i - mean X) / E X), so E p_i^2 = 1/k^2 (1 + (e - 1)
    (1 - 1/k)), and k of them sum to e/k - (e-1)/k^2. It is exact for k = 1 and as k grows; between
    them the higher orders take away up to a third.
    """
    ratios = {}
    for k, draws in ((1, 10), (2, 400_000), (4, 400_000), (64, 60_000), (256, 20_000)):
        formula = math.e / k - (math.e - 1) / k**2
        ratios[k] = _sum_of_squared_weights(k, draws) / formula
    ratios[2048] = _sum_of_squared_weights(2048, 4000) * 2048**2 / (2048 * math.e - math.e + 1)
    assert ratios[1] == pytest.approx(1, abs=1e-12)
    assert ratios[2] == pytest.approx(0.685, abs=0.005)
    assert ratios[64] == pytest.approx(0.924, abs=0.01)
    assert ratios[256] == pytest.approx(1, abs=0.03) and ratios[2048] == pytest.approx(1, abs=0.01)


def test_attention_of_independent_values_shrinks_and_its_root_does_not() -> None:
    plain, root = torch.zeros(520), torch.zeros(520)
    for q, k, v in _iid():
        plain += causal_attention(q, k, v).square().mean((0, 2, 3)) / 4
        root += sqrt_attention(q, k, v).square().mean((0, 2, 3)) / 4
    for last in (1, 64, 256, 512):
        keys = last if last == 1 else range(last - 8, last + 8)
        indices = torch.tensor([keys] if isinstance(keys, int) else list(keys))
        wanted = sum(_sum_of_squared_weights(int(n), 4000) for n in indices) / len(indices)
        assert float(plain[indices - 1].mean()) == pytest.approx(wanted, rel=0.05), last
        assert float(root[indices - 1].mean()) == pytest.approx(1, abs=0.03), last


@pytest.mark.parametrize("masked", [False, True])
def test_sqrt_attention_against_its_formula(masked: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 7, 6, generator=draw, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 6, generator=draw, requires_grad=True) for _ in range(2))
    first = torch.tensor([[0, 0, 0, 3, 3, 3, 6], [0] * 7], dtype=torch.int32) if masked else None
    upstream = torch.randn(2, 7, 4, 6, generator=draw)
    out = sqrt_attention(q, k, v, first)
    out.backward(upstream)

    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    expected = torch.zeros(2, 7, 4, 6, dtype=torch.float64)
    rows = []
    for b in range(2):
        for h in range(4):
            for i in range(7):
                start = int(first[b, i]) if first is not None else 0
                keys, values = k64[b, h // 2, start : i + 1], v64[b, h // 2, start : i + 1]
                p = ((keys @ q64[b, h, i]) / 6**0.5).softmax(0).sqrt()
                rows.append((b, i, h, p @ values))
    for b, i, h, row in rows:
        expected[b, i, h] = row
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    for ours, reference in ((q, q64), (k, k64), (v, v64)):
        assert ours.grad is not None and reference.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, atol=2e-6, rtol=1e-5)
