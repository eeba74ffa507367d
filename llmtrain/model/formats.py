"""Which number format each hidden linear layer computes in, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llmtrain.config.number_formats import QuantizationConfig
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.errors import ConfigError, EnvironmentFault
from llmtrain.linear import (
    Linear,
    Matmul,
    Numbers,
    Placement,
    TeMatmul,
    enter_recipe,
    fake_matmul,
    fp8_matmul,
    matmul_for,
)
from llmtrain.model.attention import Attention
from llmtrain.model.layers import check_patterns, layer_names, named_by
from llmtrain.model.scaling import multiplier

FP8_FORMATS = ("mus_fp8", "fp8_current")
# What FP8 products on CUDA need every dimension to be a multiple of.
FP8_MULTIPLE = 16


@dataclass(frozen=True)
class Assignment:
    """The format of one layer. shape: (outputs, inputs) of the whole weight; reason: where it is
    not the section's own format, why; else ""."""

    name: str
    shape: tuple[int, int]
    format: str
    reason: str = ""


def hidden_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The hidden linear layers of a decoder, or of its part, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.role == "hidden":
            # A stage of a pipeline has the decoder below itself.
            yield name[name.index("blocks.") :], module


def assign_formats(
    model: nn.Module, model_cfg: ModelConfig, section: QuantizationConfig
) -> list[Assignment]:
    """The format of every hidden linear layer of ``model``.

    Raises ConfigError naming a rule whose patterns match no layer of the whole model.
    """
    _check_rules(section, layer_names(model_cfg))
    return [_assign(name, layer, section) for name, layer in hidden_layers(model)]


def _check_rules(section: QuantizationConfig, names: list[str]) -> None:
    note = " (embedding and head always stay in the compute dtype)"
    for i, rule in enumerate(section.rules):
        check_patterns(f"quantization.rules.{i}.layers", rule.layers, names, note)


def _assign(name: str, layer: Linear, section: QuantizationConfig) -> Assignment:
    shape = (layer.out_features, layer.in_features)
    chosen, reason = section.format, ""
    for i, rule in enumerate(section.rules):
        if named_by(name, rule.layers):
            chosen, reason = rule.format, f"quantization.rules.{i}"
    if chosen != "none" and min(shape) < section.min_features:
        reason = f"{min(shape)} is below quantization.min_features {section.min_features}"
        chosen = "none"
    return Assignment(name, shape, chosen, reason)


def gradient_scale(cfg: RunConfig, model_cfg: ModelConfig) -> float:
    """The constant factor on gradients while they are in FP8 with static scales.

    A token's gradient in the residual stream is about the head's multiplier over the tokens of a
    step, since the loss is a mean over the global batch; its inverse makes it about 1, whatever
    batch, width and layout are.
    """
    assert cfg.quantization is not None
    if cfg.quantization.gradient_scale is not None:
        return cfg.quantization.gradient_scale
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    head = multiplier(model_cfg, "head", model_cfg.d_model)
    return 2.0 ** round(math.log2(tokens / head))


def format_matmul(
    name: str, section: QuantizationConfig, dtype: torch.dtype, scale: float = 1.0
) -> Matmul:
    """The matmul of a format; results are of ``dtype``. scale: see ``gradient_scale``."""
    if name == "none":
        return matmul_for(dtype)
    if name == "fake":
        numbers = Numbers(section.weights, section.inputs, section.gradients)
        return fake_matmul(numbers, dtype)
    return fp8_matmul(name, dtype, scale)


def switch_step(cfg: RunConfig) -> int | None:
    """Updates that are made in the section's formats, before all products are in the compute
    dtype; None: all."""
    if cfg.quantization is None or cfg.quantization.until is None:
        return None
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    return cfg.quantization.until.steps(tokens, max(cfg.train.duration.steps(tokens), 1))


def apply_formats(
    model: nn.Module, model_cfg: ModelConfig, cfg: RunConfig, device: torch.device, step: int = 0
) -> None:
    """Set the format of every hidden linear layer of a decoder as ``cfg.quantization`` says, in
    place. step: updates behind the model, as the section may end before the run.

    Raises ConfigError or EnvironmentFault naming the layer, or what the device lacks, and the
    remedy: a format is never replaced by another in silence.
    """
    section, end = cfg.quantization, switch_step(cfg)
    if section is None or (end is not None and step >= end):
        return
    layers, scale = dict(hidden_layers(model)), gradient_scale(cfg, model_cfg)
    for found in assign_formats(model, model_cfg, section):
        layer = layers[found.name]
        _check_placed(found, layer, device)
        if found.format == "te":
            layer.set_matmul(TeMatmul(section.te_recipe, found.shape))
            if not isinstance(layer.matmul, TeMatmul):
                raise ConfigError(f"quantization: {found.name} is masked, which te does not know")
        else:
            layer.set_matmul(format_matmul(found.format, section, layer.matmul.dtype, scale))
    if any(isinstance(layer.matmul, TeMatmul) for layer in layers.values()):
        enter_recipe(model, section.te_recipe)
    set_kv_format(model, section.kv)


def check_formats_on(
    model: nn.Module, model_cfg: ModelConfig, section: QuantizationConfig, device: torch.device
) -> None:
    """Raise what ``apply_formats`` would for the whole model on ``device``; changes nothing."""
    layers = dict(hidden_layers(model))
    for found in assign_formats(model, model_cfg, section):
        _check_placed(found, layers[found.name], device)


def _check_placed(found: Assignment, layer: Linear, device: torch.device) -> None:
    if found.format in FP8_FORMATS and device.type == "cuda":
        check_fp8_device(found.format, torch.cuda.get_device_capability(device))
        check_fp8_shape(found, layer)
    if found.format == "te":
        _check_te_device(device, layer.matmul.dtype)


def _check_te_device(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise EnvironmentFault(
            "quantization.format: te computes in bfloat16 on an NVIDIA GPU; use format: "
            "fp8_current, or a machine with one"
        )


def set_kv_format(model: nn.Module, name: str) -> None:
    """Round the keys and values of every block to ``name``; "none": not at all."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kv_format = name


def clear_formats(model: nn.Module) -> None:
    """Compute everything in the compute dtype from now on."""
    for _, layer in hidden_layers(model):
        layer.set_matmul(matmul_for(layer.matmul.dtype))
    set_kv_format(model, "none")


def check_fp8_device(name: str, capability: tuple[int, int]) -> None:
    """Raise EnvironmentFault where a GPU of this compute capability has no FP8 products."""
    if capability < (8, 9):
        raise EnvironmentFault(
            f"quantization.format: {name} needs a GPU of compute capability 8.9 or newer (Ada, "
            f"Hopper), and this one has {capability[0]}.{capability[1]}; take the section away, "
            "or use device: cpu, where FP8 is emulated"
        )


def check_fp8_tokens(cfg: RunConfig, tokens: int) -> None:
    """Raise ConfigError where a forward's ``tokens`` on a rank have no FP8 products on CUDA."""
    section = cfg.quantization
    if section is None or tokens % FP8_MULTIPLE == 0:
        return
    if section.formats & set(FP8_FORMATS):
        raise ConfigError(
            f"train.micro_batch_size: a forward of {tokens} tokens on each rank has no FP8 "
            f"products on CUDA, which need a multiple of {FP8_MULTIPLE}; change it or data.seq_len"
        )


def check_fp8_shape(found: Assignment, layer: Linear) -> None:
    """Raise ConfigError where this rank's part of a layer has no FP8 products on CUDA."""
    rows, columns = found.shape
    tensor = layer.plan.tensor
    ranks = 1 if tensor is None or layer.placement is Placement.REPLICATED else tensor.size
    if layer.placement is Placement.COLUMN:
        rows //= ranks
    elif layer.placement is Placement.ROW:
        columns //= ranks
    if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
        raise ConfigError(
            f"quantization: {found.name} is {rows} x {columns} on each rank, and FP8 on CUDA "
            f"needs multiples of {FP8_MULTIPLE}; change the model's widths, or leave the layer "
            f"out with quantization.rules: [{{layers: [{found.name}], format: none}}]"
        )


def reads_whole_input(model: nn.Module) -> bool:
    """Whether a layer's number format takes a scale from all of its input, so that what a token
    comes to depends on what is computed with it."""
    return any(getattr(layer.matmul, "whole_input", False) for _, layer in hidden_layers(model))


def format_lines(model: nn.Module, model_cfg: ModelConfig, cfg: RunConfig) -> list[str]:
    """What each kind of layer computes in, for ``--dry-run``: rows of equal words are merged."""
    section = cfg.quantization
    assert section is not None
    seen: dict[tuple[str, tuple[int, int], str, str], list[int]] = {}
    for found in assign_formats(model, model_cfg, section):
        _, block, kind = found.name.split(".", 2)
        row = (kind, found.shape, found.format, found.reason)
        seen.setdefault(row, []).append(int(block))
    lines = []
    for (kind, shape, name, reason), blocks in seen.items():
        what = format_matmul(name, section, torch.float32).name if name == "fake" else name
        what = f"te, {section.te_recipe}" if name == "te" else what
        what = "the compute dtype" if name == "none" else what
        why = f" ({reason})" if reason else ""
        lines.append(f"  {_ranges(blocks)} {kind} [{shape[0]}, {shape[1]}]: {what}{why}")
    if any(name == "mus_fp8" for _, _, name, _ in seen):
        lines.append(f"  gradients times {gradient_scale(cfg, model_cfg):,g} while in static FP8")
    if section.kv != "none":
        lines.append(f"  keys and values: {section.kv}, a scale per vector")
    return [*lines, "  embedding and head: the compute dtype"]


def _ranges(blocks: list[int]) -> str:
    """Consecutive numbers as first-last: "blocks 0-3, 5"."""
    spans: list[list[int]] = []
    for block in sorted(blocks):
        if spans and block == spans[-1][1] + 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"block{'s' if len(blocks) > 1 else ''} {text}"
