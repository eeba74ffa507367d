"""Makes data/mergekit.safetensors: random models and what mergekit makes of them.

Run by hand with an interpreter that has mergekit (0.1.5 made the committed file) and llmtrain::

    python tests/helpers/mergekit_reference.py tests/merge/data/mergekit.safetensors

DARE's random draws are replaced by those of llmtrain, as two random generators cannot agree.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.merge.methods import Dare
from llmtrain.merge.recipe import MergeRecipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (37, 12),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.0.mlp.down_proj.weight": (12, 20),
    "model.layers.0.mlp.gate_proj.weight": (20, 12),
    "model.layers.0.mlp.up_proj.weight": (20, 12),
    "model.layers.0.post_attention_layernorm.weight": (12,),
    "model.layers.0.self_attn.k_proj.weight": (12, 12),
    "model.layers.0.self_attn.o_proj.weight": (12, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.self_attn.v_proj.weight": (12, 12),
    "model.norm.weight": (12,),
    "lm_head.weight": (37, 12),
}
# Name: mergekit's method, weights and densities of a, b, c, and its parameters.
CASES: dict[str, tuple[str, list[float], list[float], dict[str, Any]]] = {
    "linear": ("linear", [0.2, 0.5, 0.9], [], {}),
    "slerp": ("slerp", [], [], {"t": 0.3}),
    "task-arithmetic": ("task_arithmetic", [0.4, 0.7, -0.2], [], {"lambda": 0.8}),
    "ties": ("ties", [1.0, 0.6, 0.8], [0.2, 0.5, 0.35], {"lambda": 1.1}),
    "ties-sum": ("ties", [1.0, 0.6, 0.8], [0.2, 0.2, 0.2], {"normalize": False}),
    "dare": ("dare_linear", [0.5, 0.3, 0.4], [0.4, 0.6, 0.9], {}),
    "dare-ties": ("dare_ties", [0.5, 0.3, 0.4], [0.4, 0.6, 0.9], {"normalize": True}),
    "model-stock": ("model_stock", [], [], {}),
}


def models() -> dict[str, dict[str, Tensor]]:
    """A base and three models near it."""
    random = torch.Generator().manual_seed(5)

    def draw(scale: float) -> dict[str, Tensor]:
        return {k: scale * torch.randn(s, generator=random) for k, s in SHAPES.items()}

    base, shared = draw(0.5), draw(0.1)
    out = {"base": base}
    for name in "abc":
        own = draw(0.15)
        out[name] = {k: base[k] + shared[k] + own[k] for k in base}
    return out


def merge(folder: Path, case: str) -> dict[str, Tensor]:
    """What mergekit writes for a case."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    method, weights, densities, parameters = CASES[case]
    names = ["a"] if method == "slerp" else ["a", "b", "c"]
    entries: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        own = {}
        if weights:
            own["weight"] = weights[i]
        if densities:
            own["density"] = densities[i]
        entries.append({"model": str(folder / name), "parameters": own})
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": parameters}
    if method != "linear":
        config["base_model"] = str(folder / "base")
    if method in ("slerp", "model_stock"):
        entries.insert(0, {"model": str(folder / "base")})
    config["models"] = entries
    recipe = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config)))
    out = folder / f"out-{case}"
    options = MergeOptions(copy_tokenizer=False, write_model_card=False)
    run_merge(recipe, str(out), options=options)
    return load_file(out / "model.safetensors")


def use_our_draws(all_models: dict[str, dict[str, Tensor]]) -> None:
    """Let mergekit drop the changes that llmtrain drops."""
    import mergekit.sparsify as theirs

    rule = Dare(MergeRecipe(method="dare", seed=3))
    known = {}
    for i, name in enumerate("abc"):
        for key, value in all_models[name].items():
            change = value - all_models["base"][key]
            known[tuple(change.flatten()[:4].tolist())] = (key, i)

    def bernoulli(tensor: Tensor, density: float, rescale_norm: Any = None) -> Tensor:
        key, i = known[tuple(tensor.flatten()[:4].tolist())]
        mask = rule.mask(key, i, 0, tensor.numel(), density).view_as(tensor).to(tensor.dtype)
        return theirs.rescaled_masked_tensor(tensor, mask, rescale_norm)

    theirs.bernoulli = bernoulli


def main(out: Path) -> None:
    """Write inputs as ``in.<model>.<tensor>`` and results as ``out.<case>.<tensor>``."""
    made = models()
    use_our_draws(made)
    stored = {f"in.{m}.{k}": v for m, tensors in made.items() for k, v in tensors.items()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, tensors in made.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        for case in CASES:
            for key, value in merge(folder, case).items():
                stored[f"out.{case}.{key}"] = value.clone()
    out.parent.mkdir(exist_ok=True)
    save_file(stored, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
