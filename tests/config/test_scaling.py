"""``model.scaling``: what does not go together is said with key and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config import from_dict
from llmtrain.errors import ConfigError

MUS = {"parametrization": "mus"}
POST = {"norm_placement": "post_branch"}


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({"scaling": {**MUS, "tau": 0.4}}, {}, r"model.norm_placement: pre .*use post_branch"),
        ({"scaling": {"residual": "running_mean"}}, {}, r"norm_placement: pre .*\(as set\)"),
        ({**POST, "scaling": MUS}, {}, r"model.scaling.tau: is missing.*tau_by_depth: true"),
        (
            {**POST, "scaling": {**MUS, "tau": 0.4, "tau_by_depth": True}},
            {},
            r"model.scaling.tau: and tau_by_depth exclude each other; remove one",
        ),
        ({"scaling": {"tau": 0.4}}, {}, r"scaling.tau: is read with residual: fixed, not sum"),
        ({"scaling": {"tau_by_depth": True}}, {}, r"scaling.tau_by_depth: is read with residual"),
        ({"scaling": {"base_width": 64}}, {}, r"base_width: is read with mup and mus only"),
        (
            {**POST, "init_std": 0.1, "scaling": {**MUS, "tau": 0.4}},
            {},
            r"model.init_std: is not read with parametrization: mus",
        ),
        (
            {**POST, "position": "learned", "scaling": {**MUS, "tau": 0.4}},
            {},
            r"model.position: learned adds a second embedding.*use rope or none",
        ),
        (
            {"scaling": {"attention": "sqrt"}},
            {"parallel": {"context": 2}},
            r"model.scaling.attention: sqrt does not go together with parallel.context > 1",
        ),
        (
            {"scaling": {"parametrization": "mu"}},
            {},
            r"parametrization: must be one of standard, mup, mus",
        ),
        ({**POST, "scaling": {**MUS, "tau": 1.0}}, {}, r"scaling.tau: must be less than 1"),
    ],
)
def test_what_does_not_go_together(
    model: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict({"model": model, **more})
    assert "\n" not in str(caught.value).strip(), "one fault, one sentence"


@pytest.mark.parametrize(
    "model",
    [
        {"scaling": {**MUS, "residual": "sum"}},
        {**POST, "scaling": {**MUS, "tau": 0.4}},
        {**POST, "scaling": {**MUS, "residual": "running_mean"}},
        {"position": "learned", "init_std": 0.1, "scaling": {"parametrization": "mup"}},
        {**POST, "scaling": {"residual": "fixed", "tau": 0.1, "attention": "sqrt"}},
    ],
    ids=str,
)
def test_what_does(model: dict[str, Any]) -> None:
    assert from_dict({"model": model}).model.scaling is not None
