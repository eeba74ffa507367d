"""Measurements of FP8's range against counts on the tensors themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.layout_runs import case, train_steps
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config.number_formats import QuantizationConfig
from llmtrain.methods.numerics import _of_all_ranks, measure, merge, summary
from llmtrain.ops import E4M3, E5M2

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


@pytest.mark.parametrize(("dtype", "top"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_shares_are_those_of_the_cast_itself(dtype: torch.dtype, top: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(77, 91, generator=draw) * torch.logspace(-8, 6, 91)
    x[0, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    found = summary(measure(x, dtype, factor=2.0))
    cast = (2 * x).clamp(-top, top).to(dtype).float()
    n = x.numel()
    assert found["underflow"] == ((cast == 0) & (x != 0)).sum().item() / n > 0.05
    assert found["overflow"] == (((2 * x).abs() > top) | x.isnan()).sum().item() / n > 0
    finite = x[x.isfinite()].double()
    assert found["rms"] == pytest.approx((finite.square().sum() / n).sqrt().item())
    assert found["max"] == pytest.approx(finite.abs().max().item())
    lowest, *shares = found["exponents"]
    exponents = finite[finite != 0].abs().log2().floor().clamp(-40, 20)
    for i, share in enumerate(shares):
        assert share == pytest.approx((exponents == lowest + i).sum().item() / n, abs=1e-6)


def test_parts_together_are_the_whole() -> None:
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)) * 100
    whole = measure(x, E4M3)
    assert torch.allclose(merge(measure(x[:13], E4M3), measure(x[13:], E4M3)), whole)
    assert summary(measure(x[:0], E4M3))["rms"] == 0.0

    def body(rank: int) -> dict[tuple[str, str], torch.Tensor]:
        own = {("a", "input"): measure(x[:13] if rank else x[13:], E4M3)}
        if rank:
            own["b", "input"] = whole
        return _of_all_ranks(own, torch.distributed.group.WORLD)

    for found in run_ranks(2, body):
        assert torch.allclose(found["a", "input"], whole) and len(found) == 2


@pytest.mark.parametrize("std", [1.0, 4.0])
def test_underflow_of_activations_is_ordered_as_in_the_paper(std: float) -> None:
    """GELU above SiLU above ReLU; of ReLU less than 0.04% of a unit normal (2502.05967)."""
    x = (std * torch.randn(400_000, generator=torch.Generator().manual_seed(2))).bfloat16()
    shares = {name: summary(measure(f(x), E4M3))["underflow"] for name, f in ACTIVATIONS.items()}
    assert shares["gelu"] > 1.1 * shares["silu"] > 1.1 * 1.1 * shares["relu"]
    assert shares["relu"] < 4.5e-4
    if std == 4.0:
        assert 0.1 < shares["gelu"] < 0.3


def test_a_run_records_every_layer_and_the_report_shows_it(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    changes = {"numerics__every": "3step", "quantization__format": "mus_fp8"}
    config = tiny_config(tmp_path, corpus, train__duration="6step", **changes)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny"
    found = records(run, "numerics")
    assert [r["step"] for r in found] == [1, 3, 6]
    kinds = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    for record in found:
        assert list(record["tensors"]) == [f"blocks.{i}.{k}" for i in range(2) for k in kinds]
        for roles in record["tensors"].values():
            assert set(roles) == {"input", "weight", "gradient"}
            # The constant scale keeps gradients in range.
            assert roles["gradient"]["underflow"] < 0.2 and roles["gradient"]["overflow"] == 0.0
            assert 0 < roles["gradient"]["rms"] < 5e-3 < roles["weight"]["rms"]
    measured = [r["loss"] for r in records(run)]
    config = tiny_config(tmp_path, corpus, train__duration="6step", numerics=None, name="other")
    assert main(["train", str(config), "quantization.format=mus_fp8"]) == 0
    assert measured == [r["loss"] for r in records(tmp_path / "runs" / "other")]
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Range of FP8" in page and "mlp.down" in page and "Step 6." in page


def test_without_the_gradient_scale_gradients_would_vanish() -> None:
    """The reason of ``quantization.gradient_scale``: e5m2 ends at 1.5e-5."""
    what = dataclasses.replace(case(steps=2), quantization=QuantizationConfig())
    none = dataclasses.replace(what, quantization=QuantizationConfig(gradient_scale=2.0**-12))
    good, plain = (train_steps(0, 1, w, {}) for w in (what, case(steps=2)))
    bad = train_steps(0, 1, none, {})
    assert abs(good.norms[0] / plain.norms[0] - 1) < 0.02
    assert abs(bad.norms[0] / plain.norms[0] - 1) > 0.05
