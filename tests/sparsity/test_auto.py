"""Which products a sparse layer gets: measured once, remembered, the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from llmtrain.ops import native_loaded
from llmtrain.sparsity import Case, Choice, auto, choice_lines, pick_products

pytestmark = pytest.mark.skipif(not native_loaded(), reason="the compiled kernels are not built")
CASE = Case(512, 256, (4, 4), 25, "float32")
OTHER = Case(512, 256, (1, 1), 50, "float32")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Case]:
    """Cases that are measured, in an empty cache: blocks win, single weights lose."""
    asked: list[Case] = []

    def measure(case: Case) -> Choice:
        asked.append(case)
        return Choice(3.0, 1.0) if case.block == (4, 4) else Choice(1.0, 2.0)

    monkeypatch.setattr(auto, "measure", measure)
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    return asked


def test_a_shape_is_measured_once_and_the_faster_kept(measured: list[Case]) -> None:
    small = Case(64, 64, (4, 4), 25, "float32")
    first = pick_products([CASE, OTHER, CASE, small])
    assert sorted(measured, key=str) == sorted([CASE, OTHER], key=str)
    assert first[CASE].faster and not first[OTHER].faster and not first[small].faster
    assert pick_products([OTHER, CASE, small]) == first and len(measured) == 2
    lines = choice_lines({"blocks.0.mlp.up": CASE, "blocks.1.mlp.up": CASE, "a": small}, first)
    assert lines == [
        "blocks.0.mlp.up and 1 more (512x256 4x4, 25% kept, float32): sparse products (sparse are "
        "3.00 times as fast)",
        "a (64x64 4x4, 25% kept, float32): dense products (too small to matter)",
    ]


@pytest.mark.parametrize(
    "damage", ["", "{", "[1, 2]", '{"512x256 4x4, 25% kept, float32": [1]}', '{"a": ["x", 2]}']
)
def test_a_damaged_cache_is_made_again(measured: list[Case], damage: str) -> None:
    pick_products([CASE])
    auto.cache_file().write_text(damage)
    assert pick_products([CASE])[CASE].faster and measured == [CASE, CASE]
    assert json.loads(auto.cache_file().read_text()) == {str(CASE): [3.0, 1.0]}
    pick_products([CASE])
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written_is_no_fault(
    measured: list[Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "file" / "below"))
    assert pick_products([CASE])[CASE].faster


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = auto.cache_file()
    assert path.parent == tmp_path / "llmtrain" and path == auto.cache_file()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert auto.cache_file() != path


def test_rank_0_measures_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks of other stages ask for other shapes, and would measure something else."""
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))

    def body(rank: int) -> dict[Case, Choice]:
        auto.measure = lambda case: Choice(float(rank + 1), float(case.percent))
        return pick_products([CASE] if rank == 0 else [OTHER], dist.group.WORLD)

    first, second = run_ranks(2, body)
    assert first == second == {CASE: Choice(1.0, 25.0), OTHER: Choice(1.0, 50.0)}


def test_what_is_timed_runs() -> None:
    for dtype in ("float32", "bfloat16"):
        choice = auto.measure(Case(40, 24, (4, 2), 40, dtype))
        assert choice.dense > 0 and choice.sparse > 0
