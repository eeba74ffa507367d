"""Optimizers, learning-rate schedules, parameter groups and gradient clipping."""

from llmtrain.config.lr_curve import Schedule
from llmtrain.optim.clip import (
    clip_gradients,
    clipped_step,
    counts_part,
    gradient_norm,
    sum_over_parts,
)
from llmtrain.optim.groups import ParamGroup, build_groups, groups_table
from llmtrain.optim.lion import Lion
from llmtrain.optim.optimizer import build_optimizer, set_learning_rate
from llmtrain.optim.rows import FrozenRows
from llmtrain.optim.sparse import SparseAdamW, SparseLion
from llmtrain.optim.state import create_state, replace_parameter, state_tensors

__all__ = [
    "FrozenRows",
    "Lion",
    "ParamGroup",
    "Schedule",
    "SparseAdamW",
    "SparseLion",
    "build_groups",
    "build_optimizer",
    "clip_gradients",
    "clipped_step",
    "counts_part",
    "create_state",
    "gradient_norm",
    "groups_table",
    "replace_parameter",
    "set_learning_rate",
    "state_tensors",
    "sum_over_parts",
]
