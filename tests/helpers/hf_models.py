"""Tiny random transformers models, their shape as a ModelConfig, and their weights renamed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig

VOCAB, WIDTH, LAYERS, HEADS = 83, 48, 3, 4


def _llama_like(kv: int = 2, **extra: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=88,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv,
        max_position_embeddings=64,
        attn_implementation="eager",
        pad_token_id=None,
        eos_token_id=0,
        **extra,
    )


def make(name: str, tied: bool) -> tuple[Any, ModelConfig]:
    """A transformers model in eval mode with random weights, and the same shape for Decoder."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCAB, "vocab_multiple": 16, "d_model": WIDTH,
        "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "tie_embeddings": tied,
    }  # fmt: skip
    gated: dict[str, Any] = dict(common, n_kv_heads=2, d_ff=88)
    if name == "gpt2":
        cfg = hf.GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
            attn_implementation="eager", tie_word_embeddings=tied,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        model, shape = hf.GPT2LMHeadModel(cfg), ModelConfig(
            **common, d_ff=4 * WIDTH, norm="layernorm", norm_bias=True, position="learned",
            activation="gelu_tanh", attention_bias=True, attention_out_bias=True, mlp_bias=True,
        )  # fmt: skip
    elif name == "llama":
        cfg = hf.LlamaConfig(**_llama_like(tie_word_embeddings=tied, rope_theta=5000.0))
        model = hf.LlamaForCausalLM(cfg)
        shape = ModelConfig(**gated, norm_eps=cfg.rms_norm_eps, rope_theta=5000.0)
    elif name == "llama-mha":
        cfg = hf.LlamaConfig(**_llama_like(kv=HEADS, tie_word_embeddings=tied))
        model = hf.LlamaForCausalLM(cfg)
        shape = ModelConfig(**{**gated, "n_kv_heads": HEADS}, norm_eps=cfg.rms_norm_eps)
    elif name == "qwen2":
        cfg = hf.Qwen2Config(**_llama_like(tie_word_embeddings=tied))
        model = hf.Qwen2ForCausalLM(cfg)
        shape = ModelConfig(**gated, norm_eps=cfg.rms_norm_eps, attention_bias=True)
    elif name == "qwen3":
        cfg = hf.Qwen3Config(**_llama_like(tie_word_embeddings=tied, head_dim=16))
        model = hf.Qwen3ForCausalLM(cfg)
        shape = ModelConfig(**gated, norm_eps=cfg.rms_norm_eps, qk_norm="head", d_head=16)
    elif name == "olmo2":
        cfg = hf.Olmo2Config(**_llama_like(tie_word_embeddings=tied))
        model = hf.Olmo2ForCausalLM(cfg)
        shape = ModelConfig(
            **gated, norm_eps=cfg.rms_norm_eps, qk_norm="full", norm_placement="post_branch"
        )
    else:
        raise ValueError(name)
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator) * (0.1 if param.dim() > 1 else 0.3)
        param.data.copy_(noise if param.dim() > 1 else param.data + noise)
    return model.eval(), shape


def _fuse_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int, d_head: int) -> Tensor:
    """Rows of q, k, v [heads * d_head, ...] in order of query groups."""
    rest = q.shape[1:]
    parts = [x.view(groups, -1, d_head, *rest) for x in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def renamed(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """transformers' parameters (or their gradients) under the names and shapes of Decoder.

    The vocabulary stays unpadded.
    """
    assert cfg.n_kv_heads is not None
    if "transformer.wte.weight" in tensors:
        return _from_gpt2(tensors, cfg)
    d_head = cfg.d_head or cfg.d_model // cfg.n_heads
    out = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
    }
    if not cfg.tie_embeddings:
        out["head.projection.weight"] = tensors["lm_head.weight"]
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if cfg.norm_placement == "post_branch":
        norms = {
            "post_attention_layernorm": "attention_norm",
            "post_feedforward_layernorm": "mlp_norm",
        }
    for i in range(cfg.n_layers):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        for leaf in ("weight", "bias") if cfg.attention_bias else ("weight",):
            q, k, v = (tensors[f"{old}self_attn.{x}_proj.{leaf}"] for x in "qkv")
            out[f"{new}attention.qkv.{leaf}"] = _fuse_qkv(q, k, v, cfg.n_kv_heads, d_head)
        out[f"{new}attention.out.weight"] = tensors[f"{old}self_attn.o_proj.weight"]
        gate, up = (tensors[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        out[f"{new}mlp.up.weight"] = torch.stack((gate, up), 1).flatten(0, 1)
        out[f"{new}mlp.down.weight"] = tensors[f"{old}mlp.down_proj.weight"]
        for theirs, ours in norms.items():
            out[f"{new}{ours}.weight"] = tensors[f"{old}{theirs}.weight"]
        if cfg.qk_norm != "none":
            for x in "qk":
                out[f"{new}attention.{x}_norm.weight"] = tensors[f"{old}self_attn.{x}_norm.weight"]
    return out


def _from_gpt2(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """GPT-2 stores linears transposed (Conv1D)."""
    d_head = cfg.d_model // cfg.n_heads
    base = "transformer."
    out = {
        "embedding.weight": tensors[base + "wte.weight"],
        "position_embedding.weight": tensors[base + "wpe.weight"],
    }
    if not cfg.tie_embeddings:
        out["head.projection.weight"] = tensors["lm_head.weight"]
    for leaf in ("weight", "bias"):
        out[f"final_norm.{leaf}"] = tensors[f"{base}ln_f.{leaf}"]
        for i in range(cfg.n_layers):
            old, new = f"{base}h.{i}.", f"blocks.{i}."
            fused = tensors[f"{old}attn.c_attn.{leaf}"].t()
            q, k, v = fused.chunk(3, -1 if leaf == "bias" else 0)
            out[f"{new}attention.qkv.{leaf}"] = _fuse_qkv(q, k, v, cfg.n_heads, d_head)
            for theirs, ours in (
                ("attn.c_proj", "attention.out"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")
            ):  # fmt: skip
                out[f"{new}{ours}.{leaf}"] = tensors[f"{old}{theirs}.{leaf}"].t()
            out[f"{new}attention_norm.{leaf}"] = tensors[f"{old}ln_1.{leaf}"]
            out[f"{new}mlp_norm.{leaf}"] = tensors[f"{old}ln_2.{leaf}"]
    return out


def load(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy ``renamed`` weights; padded rows of the vocabulary become 7 (they must not matter)."""
    params = dict(model.named_parameters())
    assert params.keys() == tensors.keys()
    with torch.no_grad():
        for name, value in tensors.items():
            params[name].fill_(7.0)
            params[name][: len(value)].copy_(value)
