"""Which parameters of a model are trained: low-rank adapters, or a part of its own."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021, 2106.09685)."""

    kind: str = key(
        "lora",
        "lora: alpha/rank times B A; rslora: alpha/sqrt(rank) (Kalajdzievski 2023, 2312.03732); "
        "dora: a trained length of each row besides (Liu et al. 2024, 2402.09353); rsdora: both",
        choices=("lora", "rslora", "dora", "rsdora"),
    )
    rank: int = key(16, "rows of A for each matrix", ge=1)
    alpha: float | None = key(None, "numerator of the scale; null: 2 rank (2405.09673)", gt=0)
    targets: list[str] = key(
        lambda: ["attention", "mlp"],
        "attention, mlp, single matrices (q, k, v, out, gate, up, down), or patterns of layers "
        "such as blocks.*.mlp.down, and of matrices in them, blocks.0.attention.qkv.q",
    )
    rank_pattern: dict[str, int] = key(
        dict, "target: its own rank; the last that matches counts", ge=1
    )
    alpha_pattern: dict[str, float] = key(
        dict, "target: its own alpha; the last that matches counts", gt=0
    )
    base: str | None = key(
        None,
        "frozen matrices of attention and MLP packed once when they are loaded: bf16, fp8 (e4m3), "
        "int8, nf4, nf4_double (QLoRA, 2305.14314); null: float32 as they are",
        choices=("bf16", "fp8", "int8", "nf4", "nf4_double"),
    )
    freeze: bool = key(True, "false: the model's own weights are trained as well")
