"""Rules of the ``sparsity`` section."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.length import part_of_run
from llmtrain.config.schema import RunConfig
from llmtrain.config.sparsity import CHANGING, FALLING

_LENGTH = ("train.duration", "train.global_batch_size", "data.seq_len")


def check_sparsity(cfg: RunConfig, faults: Collector) -> None:
    """What no single key of the section can be blamed for."""
    section = cfg.sparsity
    if section is None:
        return
    method, grouped = section.method, ":" in section.granularity
    if grouped and method in CHANGING and method != "srste":
        faults.add(
            "sparsity.granularity",
            f"{section.granularity} cannot follow method: {method}; take unstructured or blocks",
            "sparsity.method",
        )
    if method == "slope" and (not grouped or section.granularity.endswith("t")):
        faults.add(
            "sparsity.granularity",
            f"slope prunes N of M, not {section.granularity}; write 2:4",
            "sparsity.method",
        )
    if method == "srste" and not grouped:
        message = f"srste keeps N of M, not {section.granularity}; write 2:4"
        faults.add("sparsity.granularity", message, "sparsity.method")
    if method == "lost" and section.granularity != "unstructured":
        message = "is not read with method: lost, which keeps whole columns; leave it unstructured"
        faults.add("sparsity.granularity", message, "sparsity.method")
    if section.threshold is None and section.score_decay:
        faults.add(
            "sparsity.score_decay",
            "has no effect on which scores are the largest; set sparsity.threshold, or leave it 0",
        )
    _check_times(cfg, faults)
    _check_company(cfg, faults)
    for i, rule in enumerate(section.rules):
        if not rule.layers:
            message = "is empty; write patterns of layer names, such as blocks.0.*"
            faults.add(f"sparsity.rules.{i}.layers", message)
    if section.masks is not None and not section.masks.strip():
        faults.add("sparsity.masks", "is empty; name a file of masks, or leave it null")
    if section.masks is not None and section.method in ("gradual", "lost", "movement", "srste"):
        message = f"is not read with method: {section.method}; take it away"
        faults.add("sparsity.masks", message, "sparsity.method")
    if section.masks is not None and section.choose != "random":
        message = "is not read beside sparsity.masks; take one of them away"
        faults.add("sparsity.choose", message, "sparsity.masks")


def _check_times(cfg: RunConfig, faults: Collector) -> None:
    section = cfg.sparsity
    assert section is not None
    for name in ("until", "start", "end", "every"):
        value = getattr(section, name)
        if value is not None and part_of_run(cfg, value) > 1:
            faults.add(
                f"sparsity.{name}",
                f"{value} is after the end of the run ({cfg.train.duration}); make it earlier",
                *_LENGTH,
            )
    if section.method in FALLING and part_of_run(cfg, section.start) >= part_of_run(
        cfg, section.end
    ):
        faults.add(
            "sparsity.start",
            f"{section.start} is not before sparsity.end {section.end}; make it earlier",
            "sparsity.end",
            *_LENGTH,
        )


def _check_company(cfg: RunConfig, faults: Collector) -> None:
    section, adapters = cfg.sparsity, cfg.model.adapters
    assert section is not None
    if cfg.parallel.engine == "deepspeed":
        faults.add(
            "sparsity",
            "does not work with parallel.engine deepspeed; use the native engine",
            "parallel.engine",
        )
    if adapters is not None and adapters.base is not None:
        faults.add(
            "sparsity",
            "prunes float32 weights, and model.adapters.base packs them; take the section away "
            "(what is zero stays zero when it is packed), or set base to null",
            "model.adapters.base",
        )
    if section.method in CHANGING and cfg.average is not None:
        faults.add(
            "sparsity.method",
            f"{section.method} changes the masks, and averaged weights would not follow; use "
            "static, or take average away",
            "average",
        )
    if section.method in CHANGING and adapters is not None and adapters.freeze:
        faults.add(
            "sparsity.method",
            f"{section.method} follows weights that learn, and model.adapters freezes them; use "
            "static, or model.adapters.freeze: false",
            "model.adapters",
        )
    if section.method in ("slope", "lost") and adapters is not None and adapters.freeze:
        faults.add(
            "model.adapters.freeze",
            f"must be false with sparsity.method {section.method}, which trains the weights too",
            "sparsity.method",
        )
