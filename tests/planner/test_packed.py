"""The memory of steps whose sparse layers hold kept weights alone, from the allocator's records."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.memory import allocated
from helpers.steps import CountTraffic, batch_of, build, setting_of, small_run, step

from llmtrain import ops
from llmtrain.methods.sparsity import sparsity
from llmtrain.planner import Setting, draw, fake_world, memory_estimate, step_traffic
from llmtrain.train.module import TrainModule

pytestmark = pytest.mark.skipif(
    not ops.native_loaded(), reason="the compiled kernels are not built"
)

SHAPE: dict[str, Any] = {
    "model__d_model": 128,
    "model__d_ff": 352,
    "model__vocab_size": 300,
    "data__seq_len": 16,
    "model__n_layers": 6,
}


def sparse_module(setting: Setting) -> TrainModule:
    """The module of a run whose masks are there, stored as the config says."""
    module, section = build(setting, 0), setting.cfg.sparsity
    assert section is not None
    section = replace(section, choose="magnitude")  # random ones lie in memory of numpy, unseen
    sparsity(section).begin(SimpleNamespace(cfg=setting.cfg, module=module))  # type: ignore[arg-type]
    return module


def measured(setting: Setting) -> tuple[int, int]:
    """Bytes that are held between steps, and the most in two steps."""
    made = allocated(lambda: sparse_module(setting))
    batch = batch_of(setting)
    first = allocated(lambda: step(made.result, batch))
    second = allocated(lambda: step(made.result, batch))
    kept = made.kept + first.kept
    return kept, max(made.kept + first.peak, kept + second.peak)


@pytest.mark.parametrize(
    ("granularity", "products", "name"),
    [
        ("unstructured", "sparse", "adamw"),
        ("4x4", "sparse", "lion"),
        ("unstructured", "dense", "adamw"),
        ("16x16", "dense", "adamw"),
    ],
)
def test_kept_weights_alone_take_what_is_estimated_and_less_than_with_zeros(
    granularity: str, products: str, name: str
) -> None:
    found = {}
    for storage in ("packed", "dense"):
        section = {"density": 0.25, "granularity": granularity, "storage": storage}
        section["products"] = products
        cfg = small_run(**SHAPE, optim__name=name)
        setting = setting_of(cfg, 1)
        run = small_run(
            **SHAPE, optim__name=name, **{f"sparsity__{k}": v for k, v in section.items()}
        )
        setting = replace(setting, cfg=run, on_cpu=True)
        state, peak = measured(setting)
        estimate = memory_estimate(setting, draw(setting))
        found[storage] = peak
        if storage == "packed":
            assert estimate.peak == pytest.approx(peak, rel=0.1)
            assert sum(estimate.state.values()) == pytest.approx(state, rel=0.001)
    assert found["packed"] < 0.65 * found["dense"]


def test_replicas_send_the_gradients_of_kept_weights() -> None:
    sparsity = {"sparsity__density": 0.25, "sparsity__granularity": "4x4"}
    cfg = small_run(**sparsity, sparsity__storage="packed", parallel__replicate=2)
    setting = replace(setting_of(cfg, 2), on_cpu=True)
    with fake_world(0, 2):
        module, batch = sparse_module(setting), batch_of(setting)
        step(module, batch)
        with CountTraffic(module.layout) as counter:
            step(module, batch)
    expected: dict[tuple[str, str, int], list[int]] = {}
    for t in step_traffic(setting, draw(setting)):
        found = expected.setdefault((t.collective, t.over, t.ranks), [0, 0])
        found[0], found[1] = found[0] + t.calls, found[1] + t.payload
    wanted = {key: tuple(value) for key, value in expected.items()}
    sent = {key: value for key, value in counter.sent().items() if key in wanted}
    assert sent[("all-reduce", "replicate", 2)] == wanted[("all-reduce", "replicate", 2)]
