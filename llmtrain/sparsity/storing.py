"""Whether a run holds the kept weights alone, with moments for them only, or weights with zeros."""

from __future__ import annotations

from llmtrain.config.schema import RunConfig
from llmtrain.config.sparsity import CHANGING
from llmtrain.errors import ConfigError
from llmtrain.parallel import Degrees


def why_dense(cfg: RunConfig, degrees: Degrees, on_cpu: bool) -> str | None:
    """Why the sparse layers of a run are stored with their zeros; None: they are not.

    Raises ConfigError where ``sparsity.storage: packed`` was asked for and cannot be.
    """
    section = cfg.sparsity
    assert section is not None
    if section.storage == "dense":
        return "as sparsity.storage says"
    reason = _obstacle(cfg, degrees)
    if reason is not None and section.storage == "packed":
        raise ConfigError(f"sparsity.storage: packed: {reason}; use auto")
    if reason is None and section.storage == "auto" and not on_cpu:
        return "on GPUs it would cost time; storage: packed saves memory there too"
    return reason


def _obstacle(cfg: RunConfig, degrees: Degrees) -> str | None:
    section = cfg.sparsity
    assert section is not None
    reasons = (
        (section.method in CHANGING, f"{section.method} changes the mask"),
        (cfg.parallel.engine != "native", "DeepSpeed owns the weights"),
        (
            degrees.world > degrees.replicate,
            "ranks share each matrix; parallel.replicate alone does not",
        ),
        (cfg.train.compile, "train.compile fuses dense products"),
        (cfg.average is not None, "average keeps copies of whole weights"),
        (cfg.penalty is not None, "penalty keeps an anchor of whole weights"),
    )
    return next((text for holds, text in reasons if holds), None)
