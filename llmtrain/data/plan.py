"""The data plan of a run: sources, schedule, repetition, and what may change on resume."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import RunConfig, SourceConfig
from llmtrain.data.catalogue import Catalogue, open_catalogue
from llmtrain.data.diet import Diet
from llmtrain.data.mixture import Mixture, cut
from llmtrain.data.online import known_until
from llmtrain.data.order import sample_numbers
from llmtrain.data.packing import samples_in
from llmtrain.data.phases import continue_schedule, from_json, stretches_of, to_json
from llmtrain.data.select import Facts, Selection, select
from llmtrain.data.source import TokenSource
from llmtrain.data.targets import Stretch
from llmtrain.errors import DataError

# Raised whenever the same config would give another order of samples.
VERSION = 3


@dataclass
class DataPlan:
    """Everything that decides which tokens are trained on when.

    names, sources, sizes (samples per epoch), loss_weights and selections (None: all samples) go
    by source index. configured is what the config says, mixture what is realised: the two differ
    only after a resume that changed the future, or where weights change online. known: global
    sample up to which the order is decided; None: the whole run's.
    """

    cfg: RunConfig
    catalogue: Catalogue
    names: list[str]
    sources: list[TokenSource]
    sizes: list[int]
    loss_weights: list[float]
    selections: list[Selection | None]
    configured: list[Stretch]
    mixture: Mixture
    known: int | None = None
    _decided: threading.Condition = field(default_factory=threading.Condition)

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's; None when no tokenizer is known."""
        return self.catalogue.vocab_size

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file or folder, if known."""
        return self.catalogue.tokenizer_path

    def counts(self, i: int) -> NDArray[np.int64]:
        """Samples of each source among the first ``i`` that the run draws: [sources] int64."""
        return Diet.of(self.cfg).counts(self.mixture, i)

    def samples(
        self, low: int, high: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Source index, number within the source and loss weight of global samples [low, high)."""
        labels, before = self.mixture.locate_range(low, high)
        numbers, weights = np.empty_like(before), np.empty(high - low)
        for label in np.unique(labels):
            mine, selection = labels == label, self.selections[label]
            name, size = self.names[label], self.sizes[label]
            _, places = sample_numbers(self.cfg.seed, name, before[mine], size)
            weights[mine] = self.loss_weights[label]
            if selection is not None:
                weights[mine] *= selection.factors(places)
                places = selection.numbers(places)
            numbers[mine] = places
        return labels, numbers, weights

    def turn(self, sample: int, weights: Mapping[str, Fraction], known: int | None) -> int:
        """Deal by ``weights`` from global ``sample`` on, which is the end of what was known.

        known: sample up to which the order is decided now. A block that has begun is kept whole;
        returns the sample at which the new weights take over.
        """
        first = self.mixture.block_end(sample)
        total = self.mixture.total
        edges = [first, known, total] if known is not None and known > first else [first, total]
        future = [Stretch(a, b, weights) for a, b in itertools.pairwise(edges)]
        if first < total:
            self.mixture = self.mixture.turned(future)
        self.decide(known)
        return first

    def decide(self, known: int | None) -> None:
        """The order is decided up to sample ``known``; who waits for it goes on."""
        with self._decided:
            self.known = known
            self._decided.notify_all()

    def wait_until_known(self, sample: int, seconds: float) -> bool:
        """Whether the order up to ``sample`` is decided, after ``seconds`` at the latest."""
        with self._decided:
            return self._decided.wait_for(
                lambda: self.known is None or sample <= self.known, seconds
            )

    def write(self, file: Path) -> None:
        """``state`` as a JSON file, whole or not at all. Raises OSError."""
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps(self.state(), indent=1), encoding="utf-8")
        os.replace(aside, file)

    def tree(self) -> str:
        """Tokens, epochs and share of every source in every phase, as text."""
        from llmtrain.data.plan_text import plan_tree

        return plan_tree(self)

    def state(self) -> dict[str, Any]:
        """JSON values for checkpoints: what ``check_resume`` compares."""
        data, diet = self.cfg.data, Diet.of(self.cfg).state()
        return {
            **({} if diet is None else {"diet": diet}),
            "version": VERSION,
            "seed": self.cfg.seed,
            "seq_len": data.seq_len,
            "block_size": data.block_size,
            "vocab_size": self.vocab_size,
            "sources": {name: self._facts(i) for i, name in enumerate(self.names)},
            "configured": to_json(self.configured),
            "realised": to_json(self.mixture.stretches),
            "schedules": [to_json(schedule) for schedule in self.mixture.schedules],
            "known": self.known,
        }

    def _facts(self, index: int) -> dict[str, Any]:
        source, selection = self.sources[index], self.selections[index]
        facts = {"fingerprint": source.fingerprint, "tokens": source.num_tokens}
        return facts if selection is None else {**facts, "selected": selection.state()}

    def check_resume(self, old: dict[str, Any], consumed: int) -> None:
        """Continue the schedule of a checkpoint after ``consumed`` samples.

        The past may not change: seed, seq_len, block size, contents of the sources used so far
        and the weights so far. The future may, and sources may be added. Raises DataError saying
        what differs and how to go on.
        """
        if old["version"] != VERSION:
            raise DataError(
                f"this checkpoint's data order is of version {old['version']} and this llmtrain "
                f"makes version {VERSION}; go on with the llmtrain that wrote it, or start anew "
                "from its weights with `llmtrain checkpoint export`"
            )
        ours = self.state()
        for key, where in (
            ("seed", "seed"),
            ("seq_len", "data.seq_len"),
            ("block_size", "data.block_size"),
        ):
            if old[key] != ours[key]:
                raise DataError(
                    f"{where} is {ours[key]} but the checkpoint was made with {old[key]}, which "
                    f"would change samples already seen; resume with {where}={old[key]}"
                )
        batch = self.cfg.train.global_batch_size
        Diet.of(self.cfg).check_resume(old.get("diet"), consumed, batch)
        *earlier, current = [from_json(schedule) for schedule in old["schedules"]]
        used = Mixture(list(old["sources"]), current, old["block_size"], old["seed"], earlier)
        counts = used.counts(consumed)
        for (name, source), count in zip(old["sources"].items(), counts, strict=True):
            if count:
                self._check_source(name, source)
        configured = from_json(old["configured"])
        *earlier, current = continue_schedule(used, configured, self.configured, consumed)
        turns = [schedule[0].start for schedule in (*earlier, current)][1:]
        past = [
            s for schedule, turn in zip(earlier, turns, strict=True) for s in cut(schedule, turn)
        ]
        missing = {n for s in (*past, *current) for n in s.weights} - set(self.names)
        if missing:
            raise DataError(
                f"data.sources: {', '.join(sorted(missing))} took part in this run's past and is "
                "no longer configured; add it again (its weight may be 0 from now on)"
            )
        self.mixture = Mixture(
            self.names, current, self.cfg.data.block_size, self.cfg.seed, earlier
        )
        self.known = known_until(self.cfg, self.mixture.total // batch, consumed // batch)

    def _check_source(self, name: str, old: dict[str, Any]) -> None:
        if name not in self.names:
            raise DataError(
                f"data.sources: {name!r} was trained on before this checkpoint and is no longer "
                "configured; add it again (its weight may be 0 from now on)"
            )
        source = self.sources[self.names.index(name)]
        if source.fingerprint != old["fingerprint"]:
            raise DataError(
                f"data source {name!r} has changed since the checkpoint ({old['tokens']:,} tokens "
                f"then, {source.num_tokens:,} now); put the old data back, or add the new data "
                "as a source of another name"
            )
        ours = self._facts(self.names.index(name))
        if ours.get("selected") != old.get("selected"):
            raise DataError(
                f"data.select: another choice of samples of {name!r} than before this checkpoint, "
                "which would change samples already seen; put the earlier section and scores back, "
                "or add the data as a source of another name"
            )


def build_plan(cfg: RunConfig, total_samples: int) -> DataPlan:
    """Open the sources and lay out ``total_samples`` samples.

    Raises DataError for sources that are missing, damaged or too small for their repetition cap,
    and for weights that name no source.
    """
    catalogue = open_catalogue(cfg)
    configured = stretches_of(cfg, total_samples, catalogue.replay)
    wanted = {name for stretch in configured for name in stretch.weights}
    named = [*(n for p in cfg.data.phases for n in p.weights), *cfg.data.weights]
    catalogue.require(named)
    names = [name for name in catalogue.train if name in wanted or name in named]
    sources = [catalogue.open_train(name) for name in names]
    sizes = [samples_in(source.num_tokens, cfg.data.seq_len) for source in sources]
    # What is never drawn from needs no scores.
    facts = [
        Facts(name, source.fingerprint, size if name in wanted else 0)
        for name, source, size in zip(names, sources, sizes, strict=True)
    ]
    selections = select(cfg.data.select, cfg.seed, cfg.data.seq_len, facts)
    sizes = [size if s is None else s.size for s, size in zip(selections, sizes, strict=True)]
    for name, source, size in zip(names, sources, sizes, strict=True):
        if size == 0 and name in wanted:
            raise DataError(
                f"data source {name!r} has {source.num_tokens} token(s): nothing to train on; "
                "give it data or take its weight away"
            )
    configs: list[SourceConfig] = [catalogue.train[name] for name in names]
    mixture = Mixture(names, configured, cfg.data.block_size, cfg.seed)
    plan = DataPlan(
        cfg,
        catalogue,
        names,
        sources,
        sizes,
        [config.loss_weight for config in configs],
        selections,
        configured,
        mixture,
        known_until(cfg, total_samples // cfg.train.global_batch_size, 0),
    )
    _check_caps(plan, configs)
    return plan


def _check_caps(plan: DataPlan, configs: list[SourceConfig]) -> None:
    """Repetition caps hold for the whole run; all that break are reported together."""
    seq_len = plan.cfg.data.seq_len
    faults = []
    counts = plan.counts(plan.mixture.total)
    for name, config, size, count in zip(plan.names, configs, plan.sizes, counts, strict=True):
        if config.max_epochs is None or count <= config.max_epochs * size:
            continue
        faults.append(
            f"data source {name!r}: the schedule takes {int(count) * seq_len:,} tokens of "
            f"{size * seq_len:,}, {count / size:.2f} epochs, over its max_epochs of "
            f"{config.max_epochs:g}; lower its weight to "
            f"{config.max_epochs * size / int(count):.3g} of what it is, shorten the run, or "
            "raise max_epochs"
        )
    if faults:
        raise DataError("\n".join(faults))


def plan_report(cfg: RunConfig) -> str:
    """The text of ``llmtrain data plan``."""
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    steps = max(cfg.train.duration.steps(tokens), 1)
    return build_plan(cfg, steps * cfg.train.global_batch_size).tree()
