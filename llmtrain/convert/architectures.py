"""Architectures of ``transformers`` as model sections of ours, and back.

A ``config.json`` holds only what differs from its architecture's defaults, so the defaults are
part of the tables here. Whether a model of ours is of an architecture is decided by the round
trip: its ``config.json`` must describe the same model again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmtrain.config.schema import ModelConfig
from llmtrain.convert.rope import from_rope, to_rope
from llmtrain.errors import CheckpointError
from llmtrain.model import complete

# Says nothing about what a model computes: training, padding, and how long sequences may be.
_FREE = {
    "adapters", "init_std", "init_depth_scale", "dropout", "vocab_multiple", "max_seq_len",
}  # fmt: skip
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_GELU |= {"gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_THEIR_GELU = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True)
class Architecture:
    """One ``model_type``: its class, its defaults, and the two directions.

    model: a config with its defaults filled in -> keys of ``ModelConfig``. config: a resolved
    ``ModelConfig`` -> keys of config.json.
    """

    name: str
    class_name: str
    defaults: Mapping[str, Any]
    model: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Callable[[ModelConfig], dict[str, Any]]

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes; ValueError saying what is not supported."""
        given = {key: value for key, value in config.items() if value is not None}
        return ModelConfig(**self.model({**self.defaults, **given}))

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """config.json of a resolved model."""
        head = {"architectures": [self.class_name], "model_type": self.name}
        return {**head, **self.config(cfg)}

    def differences(self, cfg: ModelConfig) -> list[str]:
        """Keys of the model section in which a model of this architecture is another one."""
        try:
            back = complete(self.read(self.write(cfg)), None, cfg.max_seq_len or 1)
        except ValueError:
            return ["activation"]
        return [
            f.name
            for f in fields(ModelConfig)
            if f.name not in _FREE and getattr(back, f.name) != getattr(cfg, f.name)
        ]


def _llama_model(c: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3 and OLMo-2 share most of their keys."""
    if _GELU.get(c["hidden_act"]) != "silu":
        raise ValueError(f"hidden_act {c['hidden_act']!r}: the gated MLP here is SwiGLU (silu)")
    heads = int(c["num_attention_heads"])
    bias = bool(c.get("attention_bias", False))
    longest = int(c["max_position_embeddings"])
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window is not None:
        # Attention over a window is whole attention as long as a sequence fits into it.
        longest = min(longest, int(window))
    return {
        "vocab_size": int(c["vocab_size"]),
        "d_model": int(c["hidden_size"]),
        "n_layers": int(c["num_hidden_layers"]),
        "n_heads": heads,
        "n_kv_heads": int(c.get("num_key_value_heads") or heads),
        "d_head": int(c.get("head_dim") or int(c["hidden_size"]) // heads),
        "d_ff": int(c["intermediate_size"]),
        "max_seq_len": longest,
        "norm_eps": float(c["rms_norm_eps"]),
        "activation": "swiglu",
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias", False)),
        "tie_embeddings": bool(c["tie_word_embeddings"]),
        **from_rope(c),
    }


def _llama_config(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        **to_rope(cfg),
    }


def _with_head(cfg: ModelConfig) -> dict[str, Any]:
    return {**_llama_config(cfg), "head_dim": cfg.d_head}


def _llama_biased(cfg: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": cfg.attention_bias, "mlp_bias": cfg.mlp_bias}
    return {**_with_head(cfg), **biases}


def _mistral_config(cfg: ModelConfig) -> dict[str, Any]:
    return {**_with_head(cfg), "sliding_window": None}


def _qwen2_model(c: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"attention_bias": True, "attention_out_bias": False}
    return {**_llama_model({**c, "head_dim": None}), **biases}


def _qwen3_model(c: Mapping[str, Any]) -> dict[str, Any]:
    return {**_llama_model(c), "qk_norm": "head"}


def _qwen3_config(cfg: ModelConfig) -> dict[str, Any]:
    return {**_with_head(cfg), "attention_bias": cfg.attention_bias}


def _olmo2_model(c: Mapping[str, Any]) -> dict[str, Any]:
    placement = {"qk_norm": "full", "norm_placement": "post_branch"}
    return {**_llama_model({**c, "head_dim": None}), **placement}


def _olmo2_config(cfg: ModelConfig) -> dict[str, Any]:
    return {**_llama_config(cfg), "attention_bias": cfg.attention_bias}


def _gpt2_model(c: Mapping[str, Any]) -> dict[str, Any]:
    if c["scale_attn_by_inverse_layer_idx"] or not c["scale_attn_weights"]:
        raise ValueError("scale_attn_by_inverse_layer_idx and unscaled attention do not exist here")
    width = int(c["n_embd"])
    return {
        "vocab_size": int(c["vocab_size"]),
        "d_model": width,
        "n_layers": int(c["n_layer"]),
        "n_heads": int(c["n_head"]),
        "n_kv_heads": int(c["n_head"]),
        "d_head": width // int(c["n_head"]),
        "d_ff": int(c.get("n_inner") or 4 * width),
        "max_seq_len": int(c["n_positions"]),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": float(c["layer_norm_epsilon"]),
        "position": "learned",
        "activation": _activation(c["activation_function"]),
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": bool(c["tie_word_embeddings"]),
    }


def _gpt2_config(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "activation_function": _THEIR_GELU.get(cfg.activation, cfg.activation),
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_seq_len,
        "layer_norm_epsilon": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _activation(name: str) -> str:
    if name not in _GELU:
        raise ValueError(f"activation {name!r} does not exist here; there are {', '.join(_GELU)}")
    return _GELU[name]


def _neox_model(c: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(c["num_attention_heads"]), int(c["hidden_size"])
    bias = bool(c["attention_bias"])
    # rotary_emb_base and rotary_pct are the older names.
    given = {**(c.get("rope_parameters") or {})}
    theta = given.pop("rope_theta", c["rotary_emb_base"])
    fraction = given.pop("partial_rotary_factor", c["rotary_pct"])
    return {
        "vocab_size": int(c["vocab_size"]),
        "d_model": width,
        "n_layers": int(c["num_hidden_layers"]),
        "n_heads": heads,
        "n_kv_heads": heads,
        "d_head": width // heads,
        "d_ff": int(c["intermediate_size"]),
        "max_seq_len": int(c["max_position_embeddings"]),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": float(c["layer_norm_eps"]),
        "activation": _activation(c["hidden_act"]),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": True,
        "tie_embeddings": bool(c["tie_word_embeddings"]),
        "parallel_residual": bool(c["use_parallel_residual"]),
        "rope_fraction": float(fraction),
        **from_rope({**c, "rope_parameters": {**given, "rope_theta": theta}, "rope_theta": theta}),
    }


def _neox_config(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": _THEIR_GELU.get(cfg.activation, cfg.activation),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len,
        "layer_norm_eps": cfg.norm_eps,
        "attention_bias": cfg.attention_bias,
        "use_parallel_residual": cfg.parallel_residual,
        "rotary_pct": cfg.rope_fraction,
        "rotary_emb_base": cfg.rope_theta,
        "rope_scaling": to_rope(cfg)["rope_scaling"],
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


_BASE: dict[str, Any] = {
    "hidden_act": "silu", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    **_BASE, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    **_BASE, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
_NEOX: dict[str, Any] = {
    "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000,
    "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    "use_parallel_residual": True, "attention_bias": True,
}  # fmt: skip
_OLMO2: dict[str, Any] = {**_BASE, "vocab_size": 50304, "rms_norm_eps": 1e-5}

# In the order in which a model of ours is tried: the plain ones first.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", "LlamaForCausalLM", _BASE, _llama_model, _llama_biased),
        Architecture("qwen2", "Qwen2ForCausalLM", _QWEN, _qwen2_model, _llama_config),
        Architecture(
            "qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, _qwen3_model, _qwen3_config
        ),
        Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2, _olmo2_model, _olmo2_config),
        Architecture("gpt2", "GPT2LMHeadModel", _GPT2, _gpt2_model, _gpt2_config),
        Architecture("gpt_neox", "GPTNeoXForCausalLM", _NEOX, _neox_model, _neox_config),
        Architecture("mistral", "MistralForCausalLM", _MISTRAL, _llama_model, _mistral_config),
    )
}


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture a config.json names. Raises CheckpointError for an unknown one."""
    name = config.get("model_type")
    if name in ARCHITECTURES:
        return ARCHITECTURES[str(name)]
    raise CheckpointError(
        f"{where}: model_type is {name!r}; llmtrain converts {', '.join(ARCHITECTURES)}"
    )


def _setting(cfg: ModelConfig, key: str) -> str:
    if key == "scaling":
        return f"model.scaling (parametrization {cfg.scaling.parametrization})"
    return f"model.{key}={getattr(cfg, key)}"


def fitting_architecture(cfg: ModelConfig, wanted: str | None) -> Architecture:
    """The architecture that computes what a resolved model of ours does.

    wanted: by name; None: the first that fits. Raises CheckpointError naming what none of them,
    or the wanted one, has.
    """
    if wanted is not None and wanted not in ARCHITECTURES:
        raise CheckpointError(
            f"{wanted!r} is no architecture llmtrain converts; there are {', '.join(ARCHITECTURES)}"
        )
    if cfg.factorized is not None:
        raise CheckpointError(
            "no architecture of transformers has layers of two factors (model.factorized); use "
            "llmtrain generate and eval, which read the checkpoint as it is"
        )
    tried = [ARCHITECTURES[wanted]] if wanted else list(ARCHITECTURES.values())
    misfits = [(a.differences(cfg), a) for a in tried]
    keys, nearest = min(misfits, key=lambda misfit: len(misfit[0]))
    if not keys:
        return nearest
    settings = ", ".join(_setting(cfg, key) for key in keys)
    if wanted is not None:
        raise CheckpointError(
            f"{wanted} does not compute this model, which has {settings}; leave --architecture "
            "out to get one that does"
        )
    raise CheckpointError(
        "no architecture of transformers that llmtrain converts computes this model; the nearest "
        f"is {nearest.name}, which differs in {settings}"
    )
