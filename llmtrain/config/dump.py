"""A configuration as plain data and as YAML, for the run's folder and ``--print-config``."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from llmtrain.config.duration import Duration
from llmtrain.config.merge import escape
from llmtrain.config.yamlfile import Dumper


def to_dict(cfg: Any) -> dict[str, Any]:
    """``cfg`` (a section or a whole run) as plain data: durations are text, the rest JSON types."""
    return {f.name: _plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def to_yaml(cfg: Any) -> str:
    """``cfg`` as YAML with every key spelled out; loading it gives an equal configuration."""
    return yaml.dump(
        escaped(to_dict(cfg)),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=10_000,
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        return to_dict(value)
    if isinstance(value, Duration):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def escaped(value: Any) -> Any:
    """Literal ``${`` must not be read as an interpolation."""
    if isinstance(value, dict):
        return {k: escaped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [escaped(v) for v in value]
    return escape(value) if isinstance(value, str) else value
