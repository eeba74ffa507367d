"""How sparse a run is at each of its steps, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.sparsity import FALLING, SparsityConfig
from llmtrain.model import flops_per_token, layer_names, layer_shape
from llmtrain.sparsity.select import Sparse, mean_density, sparse_layers


def cubic_density(final: float, step: int, start: int, end: int) -> float:
    """Density of gradual pruning after ``step`` updates (Zhu and Gupta 2017, 1710.01878).

    d(t) = d + (1 - d) (1 - (t - t0) / (t1 - t0))^3 between ``start`` and ``end``.
    """
    if step >= end:
        return final
    if step <= start:
        return 1.0
    return final + (1.0 - final) * (1.0 - (step - start) / (end - start)) ** 3


@dataclass(frozen=True)
class Timetable:
    """When the mask begins to shrink, how often it does and when for the last time, in updates."""

    start: int
    end: int
    every: int

    @classmethod
    def of(cls, section: SparsityConfig, tokens: int, total: int) -> Timetable:
        """That of a section in a run of ``total`` updates of ``tokens`` each."""
        times = (section.start, section.end, section.every)
        start, end, every = (duration.steps(tokens, total) for duration in times)
        return cls(start, end, max(every, 1))

    def due(self, step: int) -> bool:
        """Whether the mask changes after update ``step``."""
        inside = self.start < step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def density(self, final: float, step: int) -> float:
        """``cubic_density`` after ``step`` updates."""
        return cubic_density(final, step, self.start, self.end)


def density_of_step(cfg: RunConfig, model_cfg: ModelConfig, step: int) -> float:
    """Kept share of the hidden layers' weights in the update after ``step`` others."""
    section = cfg.sparsity
    if section is None:
        return 1.0
    total, steps = _times(cfg)
    if section.until is not None and step >= section.until.steps(steps, total):
        return 1.0
    final = mean_density(model_cfg, section)
    if section.method not in FALLING:
        return final
    times = Timetable.of(section, steps, total)
    since = step - times.start
    pruned = times.end if step >= times.end else step - since % times.every
    return times.density(final, pruned)


def _times(cfg: RunConfig) -> tuple[int, int]:
    """Updates of the run, and tokens of one."""
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    return cfg.train.duration.steps(tokens), tokens


def training_flops(cfg: RunConfig, model_cfg: ModelConfig) -> float:
    """Model FLOPs of a whole run, each step at its density."""
    total, tokens = _times(cfg)
    dense = flops_per_token(model_cfg, cfg.data.seq_len)
    if cfg.sparsity is None:
        return dense * total * tokens
    empty = flops_per_token(model_cfg, cfg.data.seq_len, 0.0)
    return tokens * sum(empty * n + (dense - empty) * d * n for d, n in _stretches(cfg, model_cfg))


def _stretches(cfg: RunConfig, model_cfg: ModelConfig) -> list[tuple[float, int]]:
    """(density, updates) of the parts of a run between changes."""
    section = cfg.sparsity
    assert section is not None
    total, tokens = _times(cfg)
    cuts = {0, total}
    if section.until is not None:
        cuts.add(section.until.steps(tokens, total))
    if section.method in FALLING:
        times = Timetable.of(section, tokens, total)
        cuts |= {*range(times.start, times.end, times.every), times.end}
    marks = sorted(cut for cut in cuts if cut <= total)
    return [(density_of_step(cfg, model_cfg, a), b - a) for a, b in pairwise(marks)]


def kept_count(sparse: Sparse) -> int:
    """Kept weights of a layer; blocks that the matrix' end cuts off count as whole ones do."""
    rows, columns = sparse.shape
    return round(sparse.density * rows * columns)


def sparsity_lines(model_cfg: ModelConfig, section: SparsityConfig) -> list[tuple[str, ...]]:
    """Rows (layers, shape, granularity, density, kept weights) with a header, for ``--dry-run``."""
    sparse = sparse_layers(model_cfg, section)
    seen: dict[tuple[str, ...], int] = {}
    kept = total = 0
    for name in layer_names(model_cfg):
        shape = layer_shape(model_cfg, name)
        layer = sparse.get(name)
        text = "dense" if layer is None else layer.granularity.text
        own = shape[0] * shape[1] if layer is None else kept_count(layer)
        density = "1" if layer is None else f"{layer.density:g}"
        row = (name.split(".", 2)[2], f"{shape[0]} x {shape[1]}", text, density, f"{own:,}")
        seen[row] = seen.get(row, 0) + 1
        kept, total = kept + own, total + shape[0] * shape[1]
    rows: list[tuple[str, ...]] = [
        ("sparsity", "layers", "each", "granularity", "density", "kept in each")
    ]
    rows += [(kind, str(count), *rest) for (kind, *rest), count in seen.items()]
    rows.append(("hidden", "", f"{total:,}", "", f"{kept / total:.4g}", f"{kept:,} in all"))
    return rows
