"""Recipes of papers whose claims begin with a token count."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config import load_config
from llmtrain.data.plan import build_plan, plan_report

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "domain-upsampling.yaml"
SOURCES = ("large_cc", "small_cc", "domain", "code")
BASE = ("0.3435", "0.3670", "0.0717", "0.2178")  # Blakeney et al. 2024, table of the mixes
UPSAMPLED = ("0", "0.30", "0.35", "0.35")


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A short file of tokens in place of every source; only shares and lengths matter."""
    out = ["data.eos_id=0"]
    for name in SOURCES:
        file = tmp_path / f"{name}.npy"
        np.save(file, np.arange(8192, dtype=np.uint16))
        out += [f"data.sources.{name}.path={file}"]
    return out


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_config(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_domain_upsampling_takes_the_papers_tokens(overrides: list[str]) -> None:
    text = plan_report(load_config(RECIPE, overrides))
    upsampled = text[text.index("phase 2") : text.index("whole run")]
    found = {line.split()[1]: line.split()[2] for line in upsampled.splitlines()[2:] if "%" in line}
    assert found == {"large_cc": "0", "small_cc": "60B", "domain": "70B", "code": "70B"}


@pytest.mark.parametrize("d", ["0.05", "0.1", "0.2", "0.3"])
def test_shares_of_each_phase_are_exact_to_a_sample(overrides: list[str], d: str) -> None:
    start = 1 - Fraction(d)
    cfg = load_config(RECIPE, [*overrides, f"data.phases.0.until={float(start):g}dur"])
    steps = -(-(10**12) // (960 * 4096))
    total = steps * 960
    plan = build_plan(cfg, total)
    turn = -(-start * total // 1)
    order = [plan.names.index(name) for name in SOURCES]
    before, after = plan.counts(int(turn))[order], plan.counts(total)[order]
    for i, (base, high) in enumerate(zip(BASE, UPSAMPLED, strict=True)):
        assert abs(int(before[i]) - Fraction(base) * turn) < 1
        assert abs(int(after[i] - before[i]) - Fraction(high) * (total - turn)) < 2
    assert int(after.sum()) == total
