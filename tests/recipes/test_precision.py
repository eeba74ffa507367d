"""The report of the scaling laws for precision, on losses of a planted law."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.analysis.precision_laws import PrecisionLaw, RoundingLaw
from llmtrain.recipes import precision_scaling_laws as recipe

LAW = PrecisionLaw(3.0, 0.25, 60.0, 0.4, 1.5, (1.6, 1.2, 0.8))
ROUNDING = RoundingLaw(0.05, 0.4, 0.2, 0.6)


def _lines(monkeypatch: pytest.MonkeyPatch, law: PrecisionLaw, rounding: RoundingLaw) -> list[str]:
    points = recipe._points("mini")
    losses = {p.label: [{"text": law.loss(*recipe._size(p), p.bits)}] for p in points}
    sizes = {p.label: recipe._size(p) for p in points}

    def rounded(folder: Path, bits: int) -> float:
        n, d = sizes[folder.name]
        return law.loss(n, d, (16.0,) * 3) + rounding.rise(n, d, bits)

    monkeypatch.setattr(recipe, "_rounded", rounded)
    lines, drawing, data = recipe._study(losses, {label: [Path(label)] for label in losses})
    assert drawing.startswith("<svg") and drawing.count("<circle") == len(points) + 9
    assert len(data["cells"]) == len(points) == len(losses) and len(data["rises"]) == 36
    return lines


def test_a_planted_law_is_found_and_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, LAW, ROUNDING)
    text = "\n".join(lines)
    assert lines[-1] == "verdict: direction holds at this scale"
    assert (
        "N_eff^-0.250 + 60 D^-0.400 + 1.500; g of weights 1.60, activations 1.20, kv 0.80" in text
    )
    assert "0.05 D^0.400 N^-0.200 exp(-P / 0.600)" in text and "R2 1.000" in text


def test_a_law_of_the_other_sign_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, LAW, RoundingLaw(0.5, -0.2, 0.2, 0.6))
    assert lines[-1].startswith("verdict: direction does not hold at this scale (rounding after")
