"""The data plan as a table for people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtrain.config.phase_ends import phase_end
from llmtrain.data.diet import Diet
from llmtrain.data.online import update_steps

if TYPE_CHECKING:
    from llmtrain.data.plan import DataPlan


def plan_tree(plan: DataPlan) -> str:
    """One block per phase and one for the run: tokens, share and epochs of each source."""
    mixture, seq_len = plan.mixture, plan.cfg.data.seq_len
    edges = _phase_edges(plan)
    lines = [
        f"data plan: {tokens_text(mixture.total * seq_len)} tokens in {mixture.total:,} samples"
    ]
    for name, selection in zip(plan.names, plan.selections, strict=True):
        if selection is not None:
            many = f"{selection.size:,} of {selection.whole:,} samples"
            lines.append(f"|- {name}: {many}, {selection.text}")
    if (replay := plan.catalogue.replay) is not None and plan.cfg.data.replay is not None:
        part = plan.cfg.data.replay.fraction
        shares = ", ".join(f"{name} {float(w):.1%}" for name, w in replay.weights.items())
        lines.append(f"|- replay of {replay.run}: {part:.4g} of the tokens, as {shares}")
    if (diet := Diet.of(plan.cfg)).state() is not None:
        lines.append(
            f"|- diet: the first {diet.samples:,} samples again and again up to {diet.until:,}"
        )
    parts = [*itertools.pairwise(edges)]
    if len(parts) > 1:
        parts.append((0, mixture.total))
    for i, (low, high) in enumerate(parts):
        last = i == len(parts) - 1
        title = "whole run" if low == 0 and high == mixture.total else f"phase {i + 1}"
        until = _until(plan, i) if title.startswith("phase") and len(parts) > 1 else ""
        lines.append(f"{'`-' if last else '|-'} {title}: samples {low:,} to {high:,}{until}")
        taken = plan.counts(high) - plan.counts(low)
        rows = [("source", "tokens", "share", "epochs", "of tokens")]
        tokens = [_own_tokens(plan, label) for label in range(len(plan.names))]
        for name, own, size, count in zip(plan.names, tokens, plan.sizes, taken, strict=True):
            rows.append(
                (
                    name,
                    tokens_text(int(count) * seq_len),
                    f"{100 * count / max(high - low, 1):.2f}%",
                    f"{count / max(size, 1):.3f}",
                    tokens_text(own),
                )
            )
        lines += [f"{'  ' if last else '| '}   {line}" for line in aligned(rows)]
    return _online_lines(plan, lines)


def _until(plan: DataPlan, index: int) -> str:
    """Where the learning rate ends a phase: its level and the step."""
    cfg = plan.cfg
    level = cfg.data.phases[index].until_lr if index < len(cfg.data.phases) else None
    if level is None:
        return ""
    batch = cfg.train.global_batch_size
    step = phase_end(cfg, cfg.data.phases[index], plan.mixture.total // batch) // batch
    return f", until the learning rate is at {level:g} of its peak, at step {step:,}"


def _online_lines(plan: DataPlan, lines: list[str]) -> str:
    """The plan's lines, with what is not known yet where weights change during the run."""
    online, batch = plan.cfg.online, plan.cfg.train.global_batch_size
    if online is not None and plan.known is not None:
        steps = update_steps(plan.cfg, plan.mixture.total // batch)
        lines += [
            f"online ({online.method}): weights change after step {steps[0]:,} and then every "
            f"{steps.step:,} steps, {len(steps):,} times; known up to sample {plan.known:,},",
            "beyond it the numbers above are those of unchanged weights",
        ]
    return "\n".join(lines)


def _own_tokens(plan: DataPlan, index: int) -> int:
    """Tokens of a source that an epoch takes."""
    tokens, selection = plan.sources[index].num_tokens, plan.selections[index]
    return tokens if selection is None else min(tokens, plan.sizes[index] * plan.cfg.data.seq_len)


def _phase_edges(plan: DataPlan) -> list[int]:
    """Ends of the configured phases in samples; the steps of a ramp count as one phase."""
    cfg, total = plan.cfg, plan.mixture.total
    steps = total // cfg.train.global_batch_size
    ends = [min(phase_end(cfg, phase, steps), total) for phase in cfg.data.phases[:-1]]
    return sorted({0, *ends, total})


def tokens_text(n: int) -> str:
    """A number of tokens in four digits: 60B, 1.234M."""
    for scale, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= scale:
            return f"{n / scale:.4g}{letter}"
    return str(n)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
