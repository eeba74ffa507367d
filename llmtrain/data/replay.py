"""Replay: a part of the tokens comes from the sources of an earlier run, as that run was mixed.

Ibrahim et al. 2024 (2403.08763): with re-warming and re-decaying, 5% replay under a weak shift of
the data and 25 to 50% under a strong one keep what a model knew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import load_config
from llmtrain.config.schema import RunConfig, SourceConfig
from llmtrain.data.online import on_grid
from llmtrain.data.targets import Stretch
from llmtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llmtrain.data.catalogue import Catalogue


@dataclass(frozen=True)
class Replay:
    """weights: share of each source in the earlier run, multiples of 2^-20 that sum to 1."""

    run: str
    weights: dict[str, Fraction]


def open_replay(cfg: RunConfig, ours: Catalogue) -> Replay:
    """Read the earlier run and add its sources, and its held-out sets, to ``ours``.

    Raises DataError where there is no such run, its tokenizer differs, or one of its sources has
    the name of another one here.
    """
    from llmtrain.data.catalogue import open_catalogue

    section = cfg.data.replay
    assert section is not None
    run, state = Path(section.run), _plan(section.run)
    try:
        theirs = open_catalogue(load_config(run / "config.yaml"))
    except ConfigError as error:
        raise DataError(f"data.replay.run: {run}/config.yaml cannot be read ({error})") from error
    weights = _shares(state)
    for name in weights:
        source = theirs.train.get(name)
        if source is None:
            raise DataError(
                f"data.replay.run: the source {name!r} of {run} is not in its config any more; "
                "give another run"
            )
        present = ours.train.get(name)
        if present is not None and _place(present) != _place(source):
            raise DataError(
                f"data.replay.run: {name!r} is {source.path} in {run} and {present.path} here; "
                "give the source here another name"
            )
        plain = dataclasses.replace(source, max_epochs=None, loss_weight=1.0)
        ours.train.setdefault(name, plain)
        if name in theirs.heldout and name not in ours.heldout:
            ours.heldout[name] = theirs.heldout[name]
            if name in theirs.bytes_per_token:
                ours.bytes_per_token[name] = theirs.bytes_per_token[name]
    _check_tokenizer(run, ours, theirs)
    return Replay(section.run, weights)


def with_replay(
    stretches: Sequence[Stretch], replay: Replay, fraction: Fraction, start: int
) -> list[Stretch]:
    """``stretches`` with ``fraction`` of every sample from ``start`` on given to the replay."""
    out: list[Stretch] = []
    for one in stretches:
        if one.start < start:
            out.append(Stretch(one.start, min(one.stop, start), one.weights))
        if one.stop > start:
            weights = {name: weight * (1 - fraction) for name, weight in one.weights.items()}
            for name, share in replay.weights.items():
                weights[name] = weights.get(name, Fraction(0)) + fraction * share
            out.append(Stretch(max(one.start, start), one.stop, weights))
    return out


def _plan(run: str) -> dict[str, Any]:
    file = Path(run) / "plan.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        state["realised"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"data.replay.run: {file} is missing or damaged; give the folder of a run that "
            "llmtrain has trained"
        ) from error
    return dict(state)


def _shares(state: dict[str, Any]) -> dict[str, Fraction]:
    """Share of each source over the whole of the earlier run."""
    totals: dict[str, Fraction] = {}
    for stretch in state["realised"]:
        for name, weight in stretch["weights"].items():
            more = Fraction(weight) * (stretch["stop"] - stretch["start"])
            totals[name] = totals.get(name, Fraction(0)) + more
    whole = sum(totals.values())
    return on_grid({name: float(total / whole) for name, total in totals.items() if total})


def _place(source: SourceConfig) -> str:
    return source.path if "://" in source.path else str(Path(source.path).expanduser().resolve())


def _check_tokenizer(run: Path, ours: Catalogue, theirs: Catalogue) -> None:
    """Tokens must mean the same on both sides, as far as that is known."""
    sides = [c.manifest.get("tokenizer", {}).get("sha256") for c in (ours, theirs)]
    sizes = (ours.vocab_size, theirs.vocab_size)
    differ = None not in sizes and sizes[0] != sizes[1]
    if differ or (None not in sides and sides[0] != sides[1]):
        raise DataError(
            f"data.replay.run: {run} was trained with another tokenizer; prepare the new text with "
            "prepare.tokenizer: {kind: file, path: its corpus}"
        )
