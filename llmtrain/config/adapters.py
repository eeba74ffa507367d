"""Which parameters of a model are trained: low-rank adapters, or a part of its own."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021, 2106.09685)."""

    kind: str = key(
        "lora",
        "lora: alpha/rank times B A; rslora: alpha/sqrt(rank) (Kalajdzievski 2023, 2312.03732)",
        choices=("lora", "rslora"),
    )
    rank: int = key(16, "rows of A for each matrix", ge=1)
    alpha: float | None = key(None, "numerator of the scale; null: 2 rank (2405.09673)", gt=0)
    targets: list[str] = key(
        lambda: ["attention", "mlp"],
        "attention, mlp, single matrices (q, k, v, out, gate, up, down), or patterns of layers "
        "such as blocks.*.mlp.down",
    )
    freeze: bool = key(True, "false: the model's own weights are trained as well")
