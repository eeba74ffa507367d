"""The presets in configs/models: built models, closed forms and published sizes agree."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain.config.schema import ModelConfig
from llmtrain.model import Decoder, complete, param_counts, param_roles

FOLDER = Path(__file__).parents[2] / "configs" / "models"
PRESETS = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    # Our own, with the vocabulary of 8,192 that their comments speak of.
    "llama-17m": 16_913_280,
}


def _load(path: Path) -> ModelConfig:
    content = yaml.safe_load(path.read_text())
    assert list(content) == ["model"]
    return complete(
        ModelConfig(**content["model"]), None if "vocab_size" in content["model"] else 8192, 64
    )


def test_there_are_presets_from_1m_to_70b() -> None:
    assert set(PUBLISHED) <= {p.stem for p in PRESETS}
    sizes = sorted(param_counts(_load(p))["total"] for p in PRESETS)
    assert sizes[0] < 2e6 and sizes[-1] > 7e10


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_closed_form_equals_the_built_model(path: Path) -> None:
    cfg = _load(path)
    with torch.device("meta"):
        model = Decoder(cfg, torch.bfloat16)
    roles = param_roles(model)
    built: Counter[str] = Counter()
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        built[roles[name]] += param.numel()
    counts = param_counts(cfg)
    assert {k: v for k, v in counts.items() if k in built} == dict(built)
    assert counts["total"] == sum(built.values())
    assert counts["non_embedding"] == counts["total"] - built["embedding"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_published_size(path: Path) -> None:
    total = param_counts(replace(_load(path), vocab_multiple=1))["total"]
    comment = re.search(r"([\d,]+) parameters", path.read_text())
    if path.stem in PUBLISHED:
        assert total == PUBLISHED[path.stem]
    if comment and "," in comment[1]:
        assert total == int(comment[1].replace(",", ""))
