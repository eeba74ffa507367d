"""Plans of runs on machines that are not here: shapes, memory and communication per rank.

``draw`` builds the sharded model of any rank of any world on a fake process group;
``memory_estimate`` and ``step_traffic`` are closed forms over what it finds; ``zero_state``
and ``zero_traffic`` are the same under DeepSpeed. ``step_time`` adds the time on a ``Machine``,
``Forecaster`` puts all together, ``search`` compares layouts. Nothing here needs a GPU, a network
or the memory of the model.
"""

from llmtrain.planner.blueprint import Blueprint, Part, draw, fake_world
from llmtrain.planner.communication import Traffic, step_traffic
from llmtrain.planner.memory import Memory, memory_estimate
from llmtrain.planner.setting import Setting
from llmtrain.planner.zero import zero_state, zero_traffic

__all__ = [
    "Blueprint",
    "Memory",
    "Part",
    "Setting",
    "Traffic",
    "draw",
    "fake_world",
    "memory_estimate",
    "step_traffic",
    "zero_state",
    "zero_traffic",
]
