"""What a sparse run costs: counted step by step, and what the planner says of masks."""

from __future__ import annotations

import pytest
import torch
from helpers.steps import setting_of, small_run

from llmtrain.linear import Linear
from llmtrain.model import Decoder, complete, hidden_layers
from llmtrain.parallel import World, build_layout
from llmtrain.planner import draw
from llmtrain.planner.sparse import mask_memory
from llmtrain.sparsity import Masks, density_of_step, sparse_layers, training_flops

DENSE = 6 * (3 * (32 * 96 + 32 * 32 + 2 * 32 * 48 + 48 * 32))
REST = 6 * (250 * 32 + 24 * 32 * 3)


@pytest.mark.parametrize(
    ("section", "densities"),
    [
        ({"density": 0.25}, [0.25] * 20),
        ({"density": 0.25, "until": "0.8dur"}, [0.25] * 16 + [1.0] * 4),
        ({"method": "rigl", "density": 0.5}, [0.5] * 20),
        ({"granularity": "2:4"}, [0.5] * 20),
        (
            {
                "method": "gradual",
                "density": 0.2,
                "start": "4step",
                "end": "10step",
                "every": "3step",
            },
            [1.0] * 7 + [0.2 + 0.8 / 8] * 3 + [0.2] * 10,
        ),
    ],
)
def test_flops_are_those_of_each_steps_density(
    section: dict[str, object], densities: list[float]
) -> None:
    keys = {f"sparsity__{key}": value for key, value in section.items()}
    cfg = small_run(train__duration="20step", **keys)
    model = complete(cfg.model, None, 24)
    assert [density_of_step(cfg, model, step) for step in range(20)] == pytest.approx(densities)
    wanted = 8 * 24 * sum(REST + DENSE * d for d in densities)
    assert training_flops(cfg, model) == pytest.approx(wanted)


def test_the_planner_counts_what_layers_hold() -> None:
    section = {
        "method": "slope",
        "granularity": "2:4",
        "rules": [{"layers": ["*.mlp.up"], "density": 1}],
    }
    cfg = small_run(**{f"sparsity__{key}": value for key, value in section.items()})
    setting = setting_of(cfg, 1)
    assert cfg.sparsity is not None
    model = Decoder(setting.model, torch.float32)
    layout = build_layout(cfg.parallel, World(0, 1, 0, torch.device("cpu"), None), 4)
    sparse = sparse_layers(setting.model, cfg.sparsity)
    masks = Masks(model, dict(model.named_parameters()), layout, sparse, double=True)
    masks.draw(0)
    masks.install()
    held = copies = 0
    for _, layer in hidden_layers(model):
        assert isinstance(layer, Linear)
        layer(torch.zeros(1, layer.in_features, requires_grad=True)).sum().backward()
        for mask in (layer.mask, layer._back):
            held += 0 if mask is None else mask.kept.nbytes + mask._pruned.nbytes
        copy = layer._cache._copy
        copies += 0 if copy is None else copy.values.nbytes  # type: ignore[union-attr]
    stages = draw(setting).units(setting.stages(0))
    found = mask_memory(setting, [part for unit in stages for part in unit])
    assert found == {"masks": held, "masked copies": copies}
