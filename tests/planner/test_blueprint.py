"""Parameters of any rank of any world, against real ranks and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.steps import build, setting_of, small_run

from llmtrain.errors import LlmtrainError
from llmtrain.model import param_counts
from llmtrain.parallel.tensor import local
from llmtrain.planner import Setting, draw, memory_estimate, step_traffic


def real_shapes(rank: int, setting: Setting) -> dict[str, tuple[int, ...]]:
    params = build(setting, rank).params
    return {name: tuple(local(param).shape) for name, param in params.items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (3, {"train__global_batch_size": 6}),
        (4, {"parallel__tensor": 2, "model__mlp_bias": True, "model__tie_embeddings": True}),
        (4, {"parallel__replicate": 2, "parallel__tensor": 2, "model__qk_norm": "full"}),
        (4, {"parallel__tensor": 4, "model__n_kv_heads": 1, "model__position": "learned"}),
    ],
    ids=str,
)
def test_every_rank_is_drawn_as_it_is(world: int, changes: dict[str, Any]) -> None:
    setting = setting_of(small_run(**changes), world)
    for rank, shapes in enumerate(run_ranks(world, real_shapes, setting)):
        assert {p.name: p.local for p in draw(setting, rank).parts} == shapes


def test_stages_share_out_all_parameters_once() -> None:
    changes = {"parallel__pipeline": 3, "parallel__tensor": 2, "model__position": "learned"}
    setting = setting_of(small_run(**changes), 12)
    blueprint, names = draw(setting), []
    for stage in range(3):
        units = blueprint.units(setting.stages(stage))
        names += [part.name for unit in units for part in unit]
    assert sorted(names) == sorted(part.name for part in blueprint.parts)
    # Embeddings are first, norm and head last, and only stages in the middle send both ways.
    calls = [
        sum(
            t.calls
            for t in step_traffic(setting, blueprint, stage)
            if t.over == "pipeline" and t.what == "stages"
        )
        for stage in range(3)
    ]
    assert calls == [setting.micro_batches * n for n in (1, 2, 1)]


def test_a_thousand_ranks_hold_their_share() -> None:
    """64 shards of 8 tensor parts twice: all shapes divide, so the closed form is exact."""
    shape = {"d_model": 512, "n_layers": 4, "n_heads": 8, "d_ff": 1024, "vocab_size": 4096}
    changes: dict[str, Any] = {f"model__{key}": value for key, value in shape.items()}
    changes |= {"parallel__tensor": 8, "parallel__replicate": 2, "train__global_batch_size": 128}
    setting = setting_of(small_run(**changes), 1024)
    counts = param_counts(setting.model)
    share = ((counts["total"] - counts["norm"]) // 8 + counts["norm"]) // 64
    state = memory_estimate(setting, draw(setting)).state
    assert state["weights (fp32)"] == 4 * share
    tensors = 4 * 6 + 3
    assert state["optimizer state"] == 2 * 4 * share + 4 * tensors


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parallel__tensor": 16, "model__n_heads": 8}, "n_heads"),
        ({"parallel__tensor": 8, "model__n_heads": 8, "model__d_ff": 44}, "d_ff"),
        ({"parallel__tensor": 8, "model__n_heads": 8, "model__vocab_multiple": 1}, "vocab"),
    ],
    ids=["heads", "mlp", "vocabulary"],
)
def test_what_does_not_fit_fails_as_in_the_run(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(LlmtrainError, match=word):
        draw(setting_of(small_run(**changes), 64))
