"""The decoder language model: shapes, blocks, initialisation, closed-form sizes.

``Decoder`` covers GPT-2, Llama, Qwen and OLMo-2 by its ``ModelConfig``. ``resolve_model`` makes
a run's model section complete, ``init_weights`` fills a model on any device and layout.
"""

from llmtrain.model.activations import ActivationSplit, activation_bytes, block_activation_bytes
from llmtrain.model.adapter_activations import adapter_activation_bytes
from llmtrain.model.adapters import (
    ADAPTER,
    PARTS,
    AdaptedPart,
    adapted_parts,
    frozen_lengths,
    is_directed,
    part_names,
    set_magnitudes,
    unlike,
    whole_change,
)
from llmtrain.model.block import Block
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.decoder import Decoder, apply_recompute, compile_blocks
from llmtrain.model.embedding import Head
from llmtrain.model.factor_activations import factor_activation_bytes
from llmtrain.model.flops import flops_per_token, param_counts, stage_parts
from llmtrain.model.formats import (
    apply_formats,
    assign_formats,
    check_formats_on,
    check_fp8_tokens,
    clear_formats,
    format_lines,
    gradient_scale,
    hidden_layers,
    reads_whole_input,
    switch_step,
)
from llmtrain.model.init import build_model, init_weights, param_roles
from llmtrain.model.layers import (
    block_layers,
    check_patterns,
    count_alike,
    cut_dim,
    is_hidden_layer,
    layer_names,
    layer_shape,
    named_by,
    query_inputs,
    split_factor,
    whole_weights,
)
from llmtrain.model.merging import is_merged, merge_adapters, unmerge_adapters
from llmtrain.model.packing import (
    fill_packed,
    packed_layers,
    packed_names,
    packed_weights,
    unpacked,
)
from llmtrain.model.resolve import complete, padded_vocab, resolve_model
from llmtrain.model.scaling import decay_factor, multiplier, rate_factors, scaling_table
from llmtrain.model.sharding import (
    check_tensor_degree,
    keep_own_parts,
    partial_parameters,
    shard_over_tensor,
    tensor_placements,
)
from llmtrain.model.trainable import Trainable, limit_training

__all__ = [
    "ADAPTER",
    "PARTS",
    "ActivationSplit",
    "AdaptedPart",
    "Block",
    "Decoder",
    "Head",
    "KeyValueCache",
    "Trainable",
    "activation_bytes",
    "adapted_parts",
    "adapter_activation_bytes",
    "apply_formats",
    "apply_recompute",
    "assign_formats",
    "block_activation_bytes",
    "block_layers",
    "build_model",
    "check_formats_on",
    "check_fp8_tokens",
    "check_patterns",
    "check_tensor_degree",
    "clear_formats",
    "compile_blocks",
    "complete",
    "count_alike",
    "cut_dim",
    "decay_factor",
    "factor_activation_bytes",
    "fill_packed",
    "flops_per_token",
    "format_lines",
    "frozen_lengths",
    "gradient_scale",
    "hidden_layers",
    "init_weights",
    "is_directed",
    "is_hidden_layer",
    "is_merged",
    "keep_own_parts",
    "layer_names",
    "layer_shape",
    "limit_training",
    "merge_adapters",
    "multiplier",
    "named_by",
    "packed_layers",
    "packed_names",
    "packed_weights",
    "padded_vocab",
    "param_counts",
    "param_roles",
    "part_names",
    "partial_parameters",
    "query_inputs",
    "rate_factors",
    "reads_whole_input",
    "resolve_model",
    "scaling_table",
    "set_magnitudes",
    "shard_over_tensor",
    "split_factor",
    "stage_parts",
    "switch_step",
    "tensor_placements",
    "unlike",
    "unmerge_adapters",
    "unpacked",
    "whole_change",
    "whole_weights",
]
