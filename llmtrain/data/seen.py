"""What a run is trained on between two points: the order of its samples, worked out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config import Duration, RunConfig, load_config
from llmtrain.data.diet import Diet
from llmtrain.data.mixture import Mixture
from llmtrain.data.order import sample_numbers
from llmtrain.data.packing import samples_in
from llmtrain.data.phases import from_json
from llmtrain.data.plan import VERSION
from llmtrain.data.plan_text import aligned, tokens_text
from llmtrain.data.select import Facts, Selection, select
from llmtrain.errors import ConfigError, DataError, EnvironmentFault

_PIECE = 1 << 14


@dataclass(frozen=True)
class Seen:
    """Global samples [low, high) of a run. sizes: samples per epoch, by source index, and
    selections: which those are, None where they are all. known: sample up to which the order is
    decided, where weights change online; None: all."""

    mixture: Mixture
    sizes: list[int]
    selections: list[Selection | None]
    seq_len: int
    batch: int
    low: int
    high: int
    known: int | None = None
    diet: Diet = Diet()

    @classmethod
    def of_run(cls, run: Path, start: Duration, stop: Duration) -> Seen:
        """From the run's ``plan.json``; the data itself is not needed, scores it selected by are.

        Raises DataError for what is no run, ConfigError for points that are out of order or
        beyond its end.
        """
        state = _plan(run)
        cfg = load_config(run / "config.yaml")
        batch, seq_len = cfg.train.global_batch_size, int(state["seq_len"])
        *earlier, current = [from_json(schedule) for schedule in state["schedules"]]
        names = list(state["sources"])
        mixture = Mixture(names, current, state["block_size"], state["seed"], earlier)
        steps = mixture.total // batch
        low, high = (point.samples(seq_len, batch, steps) for point in (start, stop))
        if not low < high <= mixture.total:
            raise ConfigError(
                f"--between {start} {stop}: samples {low:,} to {high:,} are no part of {run}, "
                f"which has {mixture.total:,}; give two points in order, the last at most 1dur"
            )
        selections = _selections(cfg, state)
        sizes = [
            samples_in(source["tokens"], seq_len) if selection is None else selection.size
            for source, selection in zip(state["sources"].values(), selections, strict=True)
        ]
        known, diet = state.get("known"), Diet(**state.get("diet", {}))
        return cls(mixture, sizes, selections, seq_len, batch, low, high, known, diet)

    def lines(self) -> list[str]:
        """Samples, tokens, share and epochs of every source."""
        before, after = (self.diet.counts(self.mixture, i) for i in (self.low, self.high))
        number = self.high - self.low
        rows = [("source", "samples", "tokens", "share", "epochs")]
        for name, size, a, b in zip(self.mixture.names, self.sizes, before, after, strict=True):
            count = int(b - a)
            epochs = f"{a / max(size, 1):.3f} to {b / max(size, 1):.3f}"
            tokens = tokens_text(count * self.seq_len)
            rows.append((name, f"{count:,}", tokens, f"{100 * count / number:.2f}%", epochs))
        first, last = self.low // self.batch + 1, (self.high - 1) // self.batch + 1
        head = f"steps {first:,} to {last:,}: {tokens_text(number * self.seq_len)} tokens in "
        lines = [f"{head}{number:,} samples", *("  " + line for line in aligned(rows))]
        if self.known is not None and self.high > self.known:
            lines.append(
                f"  weights change online: only steps up to {self.known // self.batch:,} are "
                "decided; the rest is counted by the weights now in force"
            )
        return lines

    def samples(self) -> Iterator[dict[str, Any]]:
        """sample, step, source, number and epoch of each, in the order of training."""
        stop = self.low
        while stop < self.high:
            start, stop = stop, self.diet.turn(stop, min(stop + _PIECE, self.high))
            first = self.diet.drawn(start)
            labels, before = self.mixture.locate_range(first, first + stop - start)
            epochs, numbers = np.empty_like(before), np.empty_like(before)
            for label in np.unique(labels):
                mine = labels == label
                name, size = self.mixture.names[label], self.sizes[label]
                epochs[mine], places = sample_numbers(self.mixture.seed, name, before[mine], size)
                chosen = self.selections[label]
                numbers[mine] = places if chosen is None else chosen.numbers(places)
            for i in range(stop - start):
                yield {
                    "sample": start + i,
                    "step": (start + i) // self.batch + 1,
                    "source": self.mixture.names[labels[i]],
                    "number": int(numbers[i]),
                    "epoch": int(epochs[i]),
                }


def write_list(seen: Seen, file: Path) -> None:
    """One JSON line per sample. Raises EnvironmentFault."""
    try:
        with file.open("w", encoding="utf-8") as out:
            for sample in seen.samples():
                out.write(json.dumps(sample) + "\n")
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot be written ({error.strerror})") from error


def _selections(cfg: RunConfig, state: dict[str, Any]) -> list[Selection | None]:
    """What the run selected, made again from its score file."""
    facts = []
    for name, source in state["sources"].items():
        samples = samples_in(source["tokens"], state["seq_len"]) if "selected" in source else 0
        facts.append(Facts(name, source["fingerprint"], samples))
    found = select(cfg.data.select, state["seed"], state["seq_len"], facts)
    for source, selection in zip(state["sources"].values(), found, strict=True):
        if source.get("selected") != (None if selection is None else selection.state()):
            raise DataError(
                "data.select: the score file has changed since the run was started; put the old "
                "one back"
            )
    return found


def _plan(run: Path) -> dict[str, Any]:
    file = run / "plan.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is missing or damaged; give the folder of a run that has been started"
        ) from error
    if version != VERSION:
        raise DataError(
            f"{file} has a data order of version {version} and this llmtrain makes {VERSION}; use "
            "the llmtrain that trained the run"
        )
    return dict(state)
