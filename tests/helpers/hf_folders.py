"""Tiny models of transformers by name, and the command that converts their folders."""

from __future__ import annotations

from typing import Any

import torch

from llmtrain.cli.main import main

VOCAB, SEQ = 83, 64
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}

# name: (class of config, tied, what differs from a tiny model)
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("Llama", False, {}),
    "llama tied, biased": ("Llama", True, {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", False, {"rope_parameters": LLAMA3, "head_dim": 8}),
    "llama linear": ("Llama", False, {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", False, {"sliding_window": None}),
    "qwen2": ("Qwen2", True, {}),
    "qwen3": ("Qwen3", True, {"head_dim": 16}),
    "qwen3 biased": ("Qwen3", False, {"head_dim": 16, "attention_bias": True}),
    "olmo2": ("Olmo2", False, {}),
    "gpt2": ("GPT2", True, {}),
    "pythia": ("GPTNeoX", False, {"num_attention_heads": 3}),
    "neox sequential": (
        "GPTNeoX",
        True,
        {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500},
    ),
    "neox without bias": ("GPTNeoX", False, {"attention_bias": False, "rotary_pct": 0.5}),
    "gpt2 untied": ("GPT2", False, {"activation_function": "gelu"}),
}


def their_model(name: str) -> Any:
    """A tiny random model of transformers."""
    import transformers as hf

    kind, tied, extra = MODELS[name]
    if kind == "GPT2":
        shape = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": SEQ}
    else:
        shape = {
            "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": SEQ,
            "pad_token_id": None,
        }  # fmt: skip
    common = {"vocab_size": VOCAB, "tie_word_embeddings": tied, "eos_token_id": 0}
    config = getattr(hf, f"{kind}Config")(**{**shape, **common, **extra})
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape) * 0.1)
    return model.eval()


def run_convert(*words: object) -> int:
    return main(["convert", *map(str, words)])
