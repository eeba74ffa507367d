"""The report's table of how tensors lie in FP8's range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtrain.report.numbers import fixed, percent
from llmtrain.report.read import Record, Run, lookup, number

HEAD = ["layer", "tensor", "underflow, mean", "largest", "where", "overflow", "rms", "max"]


def numerics_rows(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Rows of the last measurement of each run: layers of one kind together."""
    for run in runs:
        if not run.numerics:
            continue
        record = run.numerics[-1]
        first = [run.name] if len(runs) > 1 else []
        for (kind, role), found in _by_kind(record).items():
            under = [number(values.get("underflow")) for _, values in found]
            worst = max(range(len(under)), key=under.__getitem__)
            over = max(number(values.get("overflow")) for _, values in found)
            rms = [number(values.get("rms")) for _, values in found]
            largest = max(number(values.get("max")) for _, values in found)
            spread = f"{min(rms):.3g} to {max(rms):.3g}"
            yield [
                *first,
                kind,
                role,
                percent(sum(under) / len(under), 2),
                percent(under[worst], 2),
                f"block {found[worst][0]}",
                percent(over, 2),
                spread,
                fixed(largest, 3),
            ]


def _by_kind(record: Record) -> dict[tuple[str, str], list[tuple[str, Record]]]:
    """(layer without its block, role) -> (block, numbers) of each."""
    out: dict[tuple[str, str], list[tuple[str, Record]]] = {}
    tensors = lookup(record, "tensors")
    for name, roles in (tensors if isinstance(tensors, dict) else {}).items():
        _, _, rest = str(name).partition(".")
        block, _, kind = rest.partition(".")
        for role, values in (roles if isinstance(roles, dict) else {}).items():
            if isinstance(values, dict):
                out.setdefault((kind, str(role)), []).append((block, values))
    return out
