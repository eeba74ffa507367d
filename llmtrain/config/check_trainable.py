"""Rules of ``trainable``; what its patterns match is checked where the model is known."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.length import part_of_run
from llmtrain.config.schema import RunConfig

_RUN = ("train.duration", "train.global_batch_size", "data.seq_len")


def check_trainable(cfg: RunConfig, faults: Collector) -> None:
    """Add the faults of the section."""
    for i, rule in enumerate(cfg.trainable):
        where = f"trainable.{i}"
        start, until = part_of_run(cfg, rule.start), part_of_run(cfg, rule.until)
        if until > 1:
            faults.add(
                f"{where}.until",
                f"{rule.until} is after the end of the run ({cfg.train.duration}); leave it out",
                *_RUN,
            )
        if start >= until:
            faults.add(
                f"{where}.start",
                f"{rule.start} is not before until ({rule.until}); make it earlier",
                f"{where}.until",
                *_RUN,
            )
        if rule.redraw is not None and not rule.half:
            faults.add(f"{where}.redraw", "is not read without half: true", f"{where}.half")
        if rule.half_by == "matrix":
            _check_matrices(cfg, f"{where}.half_by", rule.half, faults)
        if not rule.parameters:
            faults.add(f"{where}.parameters", "is empty; write all, roles or patterns")
    if cfg.trainable and cfg.parallel.engine == "deepspeed":
        faults.add(
            "trainable",
            "does not go together with parallel.engine: deepspeed; take it away or use engine: "
            "native",
            "parallel.engine",
        )


def _check_matrices(cfg: RunConfig, where: str, half: bool, faults: Collector) -> None:
    """Halves by matrix freeze rows of fused weights."""
    if not half:
        faults.add(where, "is not read without half: true", where.replace("half_by", "half"))
    for key, section in (("model.adapters", cfg.model.adapters), ("sparsity", cfg.sparsity)):
        if section is not None:
            faults.add(
                where,
                f"matrix freezes rows of the model's own weights, which {key} does not allow; "
                "write layer",
                key,
            )
