"""The run as a value: schema, loading, checking, durations.

``load_config(path, overrides)`` reads YAML files with ``base`` inheritance and dotted overrides
into one frozen ``RunConfig``; all faults are reported together with key, file and line.
``to_yaml`` writes it back so that loading the text gives the same run.
"""

from llmtrain.config.check import check_config
from llmtrain.config.check_layout import check_world
from llmtrain.config.dump import to_dict, to_yaml
from llmtrain.config.duration import Duration
from llmtrain.config.load import from_dict, load_config
from llmtrain.config.schema import RunConfig

__all__ = [
    "Duration",
    "RunConfig",
    "check_config",
    "check_world",
    "from_dict",
    "load_config",
    "to_dict",
    "to_yaml",
]
