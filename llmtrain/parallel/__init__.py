"""Processes and layout: the world of a run, its device mesh, FSDP2.

``World`` is what a process knows of the others; ``init_world`` joins them, ``close_world``
leaves them cleanly. ``build_layout`` lays the ranks out as pipeline x replicate x shard x context
x tensor; ``collectives`` are the conjugate pairs that layers use, ``TensorParallel`` is what a
layer knows of its group and ``ContextParallel`` what attention does, ``apply_fsdp`` shards a
model over the data ranks. Groups are always passed in; nothing here is global.
"""

from llmtrain.parallel.context import ContextParallel, SplitSequence, split_batch
from llmtrain.parallel.fragment import Fragment, local_boxes
from llmtrain.parallel.fsdp import apply_fsdp, release_gathered, set_gradient_sync
from llmtrain.parallel.mesh import Degrees, Layout, build_layout, resolve_degrees
from llmtrain.parallel.tensor import TensorParallel, finish_gradients, local, whole
from llmtrain.parallel.world import World, close_world, init_world

__all__ = [
    "ContextParallel",
    "Degrees",
    "Fragment",
    "Layout",
    "SplitSequence",
    "TensorParallel",
    "World",
    "apply_fsdp",
    "build_layout",
    "close_world",
    "finish_gradients",
    "init_world",
    "local",
    "local_boxes",
    "release_gathered",
    "resolve_degrees",
    "set_gradient_sync",
    "split_batch",
    "whole",
]
