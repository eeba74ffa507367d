"""The section that says in which number formats the hidden linear layers compute."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key

FORMATS = ("none", "mus_fp8", "fp8_current", "te", "fake")


@dataclass(frozen=True)
class FormatRule:
    """Another format for some layers."""

    layers: list[str] = key(list, "patterns of layer names, such as blocks.0.* or *.mlp.down")
    format: str = key("none", "their format", choices=FORMATS)


@dataclass(frozen=True)
class QuantizationConfig:
    """Number formats of the products of hidden linear layers; embedding and head never change."""

    format: str = key(
        "mus_fp8",
        "mus_fp8: FP8 with scale 1; fp8_current: FP8, a scale per tensor; te: by "
        "TransformerEngine; fake: rounded to `weights`, `inputs`, `gradients`; none: the compute "
        "dtype",
        choices=FORMATS,
    )
    rules: list[FormatRule] = key(list, "other formats by layer; the last that matches counts")
    min_features: int = key(
        0, "layers with fewer inputs or outputs stay in the compute dtype", ge=0
    )
    until: Duration | None = key(
        None, "from here on all products are in the compute dtype; null: never", gt=0
    )
    gradient_scale: float | None = key(
        None,
        "mus_fp8: power of two, factor on gradients while they are in FP8; null: the power of two "
        "nearest to the tokens of a step over the head's multiplier",
        gt=0,
    )
    te_recipe: str = key(
        "current",
        "te: scales from earlier steps, of the tensor, of blocks, or of 32 numbers (Blackwell)",
        choices=("delayed", "current", "block", "mxfp8"),
    )
    weights: str = key("none", "fake: int3 to int16, ternary, a float such as e4m3, or none")
    inputs: str = key("none", "fake: the same of the layers' inputs")
    gradients: str = key("none", "fake: the same of the gradients of their outputs")
    kv: str = key(
        "none", "with any format: the same of the keys and values that attention reads, by vector"
    )

    @property
    def formats(self) -> set[str]:
        """Of all layers and of some."""
        return {self.format, *(rule.format for rule in self.rules)}


@dataclass(frozen=True)
class NumericsConfig:
    """Measuring how the hidden layers' tensors lie in the range of FP8, in whatever format they
    compute."""

    every: Duration = key(lambda: dur("0.1dur"), "time between measurements", gt=0)
