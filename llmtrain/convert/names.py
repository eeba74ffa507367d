"""Which tensors of ``transformers`` make up each of ours, and how they are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig

VOCABULARY = ("embedding.weight", "head.projection.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_TABLES = (
    "rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias",
    "attention.masked_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, without its ``model.`` prefix, and those it is made of.

    kind: ``same``; ``transposed`` (GPT-2 keeps weights as [in, out]); ``qkv``: queries, keys and
    values, which here lie in one tensor in order of query groups; ``qkv_transposed``: the same
    from one [in, 3 d] tensor; ``heads``: one tensor in the order of heads, as here (GPT-NeoX), but
    with the turned dimensions of a head first; ``gated``: gate and up, whose rows alternate here.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: str = "same"

    def join(self, parts: Sequence[Tensor], cfg: ModelConfig) -> Tensor:
        """Our tensor from theirs, without padding of the vocabulary."""
        if self.kind == "same":
            return parts[0]
        if self.kind == "transposed":
            return parts[0].t().contiguous()
        if self.kind == "gated":
            return torch.stack((parts[0], parts[1]), 1).flatten(0, 1)
        if self.kind == "heads":
            return parts[0][_turned_rows(cfg)]
        if self.kind == "qkv_transposed":
            parts = (parts[0].t() if parts[0].dim() > 1 else parts[0]).chunk(3)
        groups, d_head = _groups(cfg)
        rows = [part.reshape(groups, -1, d_head, *part.shape[1:]) for part in parts]
        return torch.cat(rows, 1).flatten(0, 2)

    def split(self, whole: Tensor, cfg: ModelConfig) -> list[Tensor]:
        """Their tensors from ours."""
        if self.kind == "same":
            return [whole]
        if self.kind == "transposed":
            return [whole.t().contiguous()]
        if self.kind == "gated":
            return [whole[0::2].contiguous(), whole[1::2].contiguous()]
        if self.kind == "heads":
            return [whole[torch.argsort(_turned_rows(cfg))]]
        groups, d_head = _groups(cfg)
        slots = whole.reshape(groups, -1, d_head, *whole.shape[1:])
        parts = [slots[:, :-2], slots[:, -2:-1], slots[:, -1:]]
        rows = [part.flatten(0, 2) for part in parts]
        if self.kind == "qkv":
            return [part.contiguous() for part in rows]
        joined = torch.cat(rows)
        return [joined.t().contiguous() if joined.dim() > 1 else joined]


def _groups(cfg: ModelConfig) -> tuple[int, int]:
    assert cfg.n_kv_heads is not None and cfg.d_head is not None
    return cfg.n_kv_heads, cfg.d_head


def _turned_rows(cfg: ModelConfig) -> Tensor:
    """Which row of GPT-NeoX's q k v weight each row of ours is.

    There a head's first ``rope_fraction`` turns, in pairs (i, i + half of that part). Here pairs
    are (i, i + d / 2) and the first of them turn, so rows of queries and keys change places.
    """
    assert cfg.d_head is not None
    d = cfg.d_head
    half = int(d * cfg.rope_fraction) // 2
    first = [*range(half), *range(2 * half, d // 2 + half)]
    second = [*range(half, 2 * half), *range(d // 2 + half, d)]
    turned, plain = torch.tensor(first + second), torch.arange(d)
    one = torch.cat((turned, d + turned, 2 * d + plain))
    heads: Tensor = (3 * d * torch.arange(cfg.n_heads)[:, None] + one).flatten()
    return heads


def rules_for(architecture: str, cfg: ModelConfig) -> list[Rule]:
    """All rules of a resolved model; a tied head has none."""
    kinds = {"gpt2": _gpt2, "gpt_neox": _neox}
    return kinds.get(architecture, _llama)(cfg)


def ignored(name: str) -> bool:
    """Whether a tensor of theirs is none of the model's weights: tables and masks that old files
    hold, and a head that is tied."""
    return name.endswith(_TABLES) or name in HEADS


def _llama(cfg: ModelConfig) -> list[Rule]:
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("final_norm.weight", ("model.norm.weight",)),
    ]
    if not cfg.tie_embeddings:
        rules.append(Rule("head.projection.weight", ("lm_head.weight",)))
    norms = ("input_layernorm", "post_attention_layernorm")
    if cfg.norm_placement == "post_branch":
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for i in range(cfg.n_layers):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        for ours, theirs in zip(("attention_norm", "mlp_norm"), norms, strict=True):
            rules.append(Rule(f"{new}{ours}.weight", (f"{old}{theirs}.weight",)))
        for leaf in ("weight", "bias") if cfg.attention_bias else ("weight",):
            parts = tuple(f"{old}self_attn.{x}_proj.{leaf}" for x in "qkv")
            rules.append(Rule(f"{new}attention.qkv.{leaf}", parts, "qkv"))
        for leaf in ("weight", "bias") if cfg.attention_out_bias else ("weight",):
            rules.append(Rule(f"{new}attention.out.{leaf}", (f"{old}self_attn.o_proj.{leaf}",)))
        if cfg.qk_norm != "none":
            for x in "qk":
                name = f"{x}_norm.weight"
                rules.append(Rule(f"{new}attention.{name}", (f"{old}self_attn.{name}",)))
        for leaf in ("weight", "bias") if cfg.mlp_bias else ("weight",):
            pair = tuple(f"{old}mlp.{x}_proj.{leaf}" for x in ("gate", "up"))
            rules.append(Rule(f"{new}mlp.up.{leaf}", pair, "gated"))
            rules.append(Rule(f"{new}mlp.down.{leaf}", (f"{old}mlp.down_proj.{leaf}",)))
    return rules


def _gpt2(cfg: ModelConfig) -> list[Rule]:
    base = "transformer."
    rules = [
        Rule("embedding.weight", (base + "wte.weight",)),
        Rule("position_embedding.weight", (base + "wpe.weight",)),
    ]
    if not cfg.tie_embeddings:
        rules.append(Rule("head.projection.weight", ("lm_head.weight",)))
    pairs = (
        ("attention.out", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")
    )  # fmt: skip
    for leaf in ("weight", "bias"):
        rules.append(Rule(f"final_norm.{leaf}", (f"{base}ln_f.{leaf}",)))
        turned = "transposed" if leaf == "weight" else "same"
        for i in range(cfg.n_layers):
            old, new = f"{base}h.{i}.", f"blocks.{i}."
            fused = (f"{old}attn.c_attn.{leaf}",)
            rules.append(Rule(f"{new}attention.qkv.{leaf}", fused, "qkv_transposed"))
            for ours, theirs in pairs:
                rules.append(Rule(f"{new}{ours}.{leaf}", (f"{old}{theirs}.{leaf}",), turned))
            for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
                rules.append(Rule(f"{new}{ours}.{leaf}", (f"{old}{theirs}.{leaf}",)))
    return rules


def _neox(cfg: ModelConfig) -> list[Rule]:
    base = "gpt_neox."
    rules = [Rule("embedding.weight", (base + "embed_in.weight",))]
    if not cfg.tie_embeddings:
        rules.append(Rule("head.projection.weight", ("embed_out.weight",)))
    pairs = (
        ("attention.qkv", "attention.query_key_value", "heads"),
        ("attention.out", "attention.dense", "same"),
        ("mlp.up", "mlp.dense_h_to_4h", "same"),
        ("mlp.down", "mlp.dense_4h_to_h", "same"),
        ("attention_norm", "input_layernorm", "same"),
        ("mlp_norm", "post_attention_layernorm", "same"),
    )
    for leaf in ("weight", "bias"):
        rules.append(Rule(f"final_norm.{leaf}", (f"{base}final_layer_norm.{leaf}",)))
        for i in range(cfg.n_layers):
            for ours, theirs, kind in pairs:
                attention = ours in ("attention.qkv", "attention.out")
                if leaf == "bias" and attention and not cfg.attention_bias:
                    continue
                name = f"{base}layers.{i}.{theirs}.{leaf}"
                rules.append(Rule(f"blocks.{i}.{ours}.{leaf}", (name,), kind))
    return rules
