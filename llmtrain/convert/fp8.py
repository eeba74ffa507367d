"""FP8 weights in a Hugging Face folder, with the numbers that training computed with.

The style is compressed-tensors' ``float-quantized``, which vLLM and transformers read: a weight in
e4m3 and beside it ``weight_scale`` (float32 [1]), by which it is multiplied. The bytes are those of
training. With static scales (``mus_fp8``) the layer's forward multiplier, 1/sqrt(fan_in), is the
weight's scale and ``input_scale`` is 1: inputs are clipped and cast as in training. ``fp8_current``
has the tensor's own scale times the multiplier, and inputs get theirs at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.convert.names import Rule
from llmtrain.convert.scaling import fold_factor
from llmtrain.convert.writing import Target
from llmtrain.errors import CheckpointError
from llmtrain.linear import Packed, fp8_matmul
from llmtrain.model import Decoder, assign_formats, switch_step
from llmtrain.model.formats import FP8_FORMATS, FP8_MULTIPLE
from llmtrain.parallel.hardware import has_fast_bf16

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Fp8Weights:
    """The weights of ours that are written in FP8, by name, in the run's format. compute: the dtype
    that training rounds them to before the cast."""

    format: str
    names: frozenset[str]
    compute: torch.dtype
    cfg: ModelConfig

    def cast(self, name: str, weight: Tensor) -> tuple[Tensor, float]:
        """The numbers of the FP8 weight, in float32, and what multiplies them."""
        packed = fp8_matmul(self.format, self.compute).operand(weight.to(self.compute))
        assert isinstance(packed, Packed) and packed.values is not None
        scale = 1.0 if packed.scale is None else float(packed.scale)
        return packed.values.float(), scale * fold_factor(self.cfg, name)

    def targets(self, weight: Target) -> list[Target]:
        """What stands in the file for a weight of theirs; the scales first, to be aligned."""
        if any(size % FP8_MULTIPLE for size in weight.shape):
            raise CheckpointError(
                f"--fp8: {weight.name} is {' x '.join(map(str, weight.shape))}, and FP8 products "
                f"read multiples of {FP8_MULTIPLE}; leave --fp8 out"
            )
        names = [weight.name + "_scale"]
        if self.format == "mus_fp8":
            names.append(weight.name.removesuffix("weight") + "input_scale")
        scales = [Target(name, torch.float32, (1,)) for name in names]
        return [*scales, Target(weight.name, torch.float8_e4m3fn, weight.shape)]

    def values(self, part: Tensor, scale: float) -> list[Tensor]:
        """The tensors of ``targets``."""
        scales = [torch.tensor([scale])]
        if self.format == "mus_fp8":
            scales.append(torch.ones(1))
        return [*scales, part]

    def config(self, rules: list[Rule]) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
        inputs = {**weights, "dynamic": self.format != "mus_fp8"}
        hidden = [r for r in rules if _is_hidden(r.ours) and r.ours not in self.names]
        ignored = [name.removesuffix(".weight") for rule in hidden for name in rule.theirs]
        group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}
        return {
            "quant_method": METHOD,
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "input_activations": inputs}},
            "ignore": ["lm_head", *ignored],
            "kv_cache_scheme": None,
        }


def _is_hidden(name: str) -> bool:
    return name.endswith(("qkv.weight", "attention.out.weight", "up.weight", "down.weight"))


def fp8_weights(run: RunConfig, cfg: ModelConfig, step: int, architecture: str) -> Fp8Weights:
    """What of the checkpoint of a run after ``step`` updates computes in FP8.

    cfg: its resolved model. Raises CheckpointError where nothing does, or where the style cannot
    say how.
    """
    section, end = run.quantization, switch_step(run)
    if section is None or (end is not None and step >= end):
        why = "the run has no quantization section" if section is None else "of quantization.until"
        raise CheckpointError(f"--fp8: no layer computes in FP8 here ({why}); leave --fp8 out")
    if cfg.adapters is not None:
        raise CheckpointError("--fp8: adapters are merged into weights that training never cast")
    if architecture == "gpt2":
        raise CheckpointError("--fp8: GPT-2 keeps weights transposed, which the style has not")
    with torch.device("meta"):
        found = assign_formats(Decoder(cfg), cfg, section)
    formats = {a.format for a in found if a.format in FP8_FORMATS}
    others = {a.format for a in found} - {*FP8_FORMATS, "none"}
    if len(formats) != 1 or others:
        named = ", ".join(sorted({a.format for a in found}))
        raise CheckpointError(f"--fp8: layers compute in {named}; one FP8 format can be written")
    bf16 = run.precision.compute == "bf16"
    if run.precision.compute == "auto":
        bf16 = run.device == "cuda" or has_fast_bf16(torch.device("cpu"))
    names = frozenset(f"{a.name}.weight" for a in found if a.format in formats)
    return Fp8Weights(formats.pop(), names, torch.bfloat16 if bf16 else torch.float32, cfg)
