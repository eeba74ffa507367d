"""Multipliers folded into weights: transformers computes what our scaled model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_corpus, tiny_config

from llmtrain.cli.main import main
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.scaling import folded
from llmtrain.errors import CheckpointError
from llmtrain.eval.loading import load_trained
from llmtrain.model import complete


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded")
    return tiny_config(folder, make_corpus(folder, documents=40), train__duration="2step")


@pytest.mark.parametrize(
    "scaling",
    ["{parametrization: mus, residual: sum}", "{parametrization: mup, base_width: 8}"],
)
def test_a_folded_model_is_the_same_function(config: Path, tmp_path: Path, scaling: str) -> None:
    import transformers as hf

    run = tmp_path / "run"
    changes = [f"out={tmp_path}", "name=run", f"model.scaling={scaling}"]
    assert main(["train", str(config), *changes]) == 0
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf")]) == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = load_trained(run, torch.device("cpu"), ["precision.compute=fp32"])
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = ours.model(tokens)
        assert float(expected.std()) > 1e-3
        # RMSNorm and sums of a stream of size 30 are rounded elsewhere.
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    # Read back it is a model of the standard parametrisation.
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back = load_trained(tmp_path / "back", torch.device("cpu"), ["precision.compute=fp32"])
    assert back.model_cfg.scaling == ScalingConfig()
    with torch.no_grad():
        torch.testing.assert_close(back.model(tokens), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scaling": {"parametrization": "mus", "tau": 0.4}}, "residual: fixed"),
        ({"scaling": {"residual": "running_mean"}}, "residual: running_mean"),
        ({"scaling": {"attention": "sqrt"}}, "attention: sqrt"),
        (
            {"scaling": {"parametrization": "mup"}, "tie_embeddings": True},
            "a multiplier of the head alone",
        ),
    ],
)
def test_what_weights_cannot_express(changes: dict[str, Any], says: str) -> None:
    shape: dict[str, Any] = {"vocab_size": 101, "norm_placement": "post_branch", "d_model": 64}
    changes = {**changes, "scaling": ScalingConfig(**changes["scaling"])}
    with pytest.raises(CheckpointError, match=f"model.scaling has {says}"):
        folded(complete(ModelConfig(**{**shape, **changes}), None, 16))
