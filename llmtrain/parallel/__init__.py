"""Processes and layout: the world of a run, its device mesh, FSDP2.

``World`` is what a process knows of the others; ``init_world`` joins them, ``close_world``
leaves them cleanly. ``build_mesh`` lays the ranks out as replicate x shard and ``apply_fsdp``
shards a model over it. Groups are always passed in; nothing here is global.
"""

from llmtrain.parallel.fsdp import apply_fsdp, release_gathered, set_gradient_sync
from llmtrain.parallel.mesh import build_mesh
from llmtrain.parallel.world import World, close_world, init_world

__all__ = [
    "World",
    "apply_fsdp",
    "build_mesh",
    "close_world",
    "init_world",
    "release_gathered",
    "set_gradient_sync",
]
