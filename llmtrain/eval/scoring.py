"""Scoring every sample of a run's sources: ``llmtrain data score``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.config import load_config
from llmtrain.config.load import any_length
from llmtrain.config.schema import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.data.catalogue import Catalogue, open_catalogue
from llmtrain.data.loader import heldout_sets, packing_of, to_batch
from llmtrain.data.packing import Pick
from llmtrain.data.scores import LOSSES, Piece, ScoreParts, describe, pieces_of, read_scores
from llmtrain.data.source import TokenSource
from llmtrain.errors import ConfigError, DataError
from llmtrain.eval.loading import Trained, load_trained, require_plain
from llmtrain.eval.probes import FORWARD, INFLUENCE, Scorer, scorer
from llmtrain.eval.sharing import answer_layout
from llmtrain.parallel import World, close_world, init_world

Say = Callable[[str], None]
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """What is wanted. target: a config file, a run or a checkpoint, whose data is scored.
    checkpoints: runs or checkpoints whose scores are averaged; empty: the target. tensor: ranks
    that share a model. lr: of influence's step."""

    target: Path
    overrides: Sequence[str]
    checkpoints: Sequence[Path]
    method: str
    out: Path
    device: str = "auto"
    tensor: int = 1
    lr: float = 0.01


def score(request: Request, say: Say, world: World | None = None) -> None:
    """Write the score file; broken off, the same call goes on. Raises LlmtrainError.

    Under torchrun the pieces are split over the ranks. say: prints a line, on the main rank.
    world: joined by the caller, who leaves it afterwards.
    """
    if request.tensor > 1 and request.method not in FORWARD:
        raise ConfigError(
            f"--tensor: {request.method} makes gradients of one sample, for which ranks cannot "
            f"share the model; leave --tensor away, or take one of {', '.join(FORWARD)}"
        )
    joined = init_world(request.device) if world is None else world
    try:
        _Scoring(request, joined, say if joined.is_main else lambda line: None).run()
    finally:
        if world is None:
            close_world()


class _Scoring:
    """One call of ``score`` on one rank."""

    def __init__(self, request: Request, world: World, say: Say) -> None:
        self.request, self.world, self.say = request, world, say
        self.ranks = Ranks(world.cpu_group)
        alone = Ranks(None)
        paths = list(request.checkpoints)
        if request.target.is_dir():
            found = find(alone, request.target, "model.")[0]
            self.cfg = load_config(found / "config.yaml", request.overrides)
            paths = paths or [request.target]
        else:
            self.cfg = load_config(request.target, request.overrides, epochs=any_length)
        if not paths:
            raise ConfigError(
                f"{request.target} is a config: name the trained model with --checkpoint, or give "
                "a run's folder in its place"
            )
        self.paths = [find(alone, path, "model.")[0] for path in paths]
        self.catalogue = open_catalogue(self.cfg)
        self.sources = _sources(self.cfg, self.catalogue)
        self.layout = answer_layout(world, request.tensor, self.paths[0])

    def run(self) -> None:
        """All pieces that are missing, then the file."""
        header = self._header()
        parts = ScoreParts(self.request.out)
        done = self.ranks.on_main(lambda: parts.begin(header))
        pieces = pieces_of(header)
        missing = [piece for piece in pieces if piece.name not in done]
        if len(missing) < len(pieces):
            self.say(f"going on: {len(pieces) - len(missing)} of {len(pieces)} pieces are there")
        own = missing[self.layout.data_rank :: self.layout.degrees.data]
        self.ranks.reduce(lambda: self._pieces(own, parts), lambda _: None)
        self.ranks.on_main(lambda: parts.finish(header))
        for line in _summary(header, self.request.out) if self.world.is_main else ():
            self.say(line)

    def _header(self) -> dict[str, Any]:
        request, data = self.request, self.cfg.data
        header = describe(self.sources, data.seq_len)
        header |= {
            "method": request.method,
            "checkpoints": [str(path.absolute()) for path in self.paths],
            "document_mask": data.document_mask,
            "reset_positions": data.reset_positions,
        }
        if request.method in INFLUENCE:
            header["heldout_samples"] = self.cfg.eval.samples
        if request.method == "influence":
            header["lr"] = request.lr
        return header

    def _pieces(self, pieces: list[Piece], parts: ScoreParts) -> None:
        """Score this rank's pieces and write them."""
        packing, sources = packing_of(self.cfg.data), {s.name: s for s in self.sources}
        total, done = sum(p.high - p.low for p in pieces), 0
        began = spoke = time.monotonic()
        for number in sorted({piece.checkpoint for piece in pieces}):
            scores = self._scorer(number)
            for piece in (p for p in pieces if p.checkpoint == number):
                values, tokens = [], []
                for low in range(piece.low, piece.high, self._rows):
                    high = min(low + self._rows, piece.high)
                    rows = packing.rows(
                        [Pick(sources[piece.source], i, 1.0) for i in range(low, high)]
                    )
                    nowhere = np.zeros(high - low, np.int64)
                    batch = to_batch(rows, nowhere, np.arange(low, high))
                    values.append(scores(batch.to(self.world.device)).cpu())
                    tokens.append((batch.weights > 0).sum(1))
                if self.layout.counts_samples:
                    parts.write(piece, torch.cat(values).numpy(), torch.cat(tokens).numpy())
                done += piece.high - piece.low
                now = time.monotonic()
                if now - spoke >= _LINE_SECONDS:
                    spoke = now
                    left = (total - done) * (now - began) / done
                    share = f"{done / total:.0%} of this rank's {total:,} samples"
                    self.say(f"{self.request.method}: {share}, {left:.0f} s left")

    @property
    def _rows(self) -> int:
        return self.cfg.eval.micro_batch_size or self.cfg.train.micro_batch_size or 16

    def _scorer(self, number: int) -> Scorer:
        path = self.paths[number]
        # A step's effect on the loss would drown in the rounding of bf16 and FP8.
        plain = ["precision.compute=fp32", "quantization=null"]
        exact = plain if self.request.method == "influence" else []
        trained = load_trained(path, self.world.device, exact, self.layout)
        if exact:
            require_plain(trained, self.request.method)
        self.say(f"{self.request.method} by {path} (step {trained.step})")
        _check_fit(self.cfg, self.catalogue, trained)
        target: list[Batch] = []
        if self.request.method in INFLUENCE:
            for held in heldout_sets(self.cfg, self.catalogue):
                batches = held.batches(self._rows, 0, 1)
                target += [batch.to(self.world.device) for batch in batches]
        return scorer(self.request.method, trained, self.cfg.data, target, self.request.lr)


def _sources(cfg: RunConfig, catalogue: Catalogue) -> list[TokenSource]:
    """Those with a weight in the mixture; of a config without one, all. Raises DataError."""
    mixtures = [cfg.data.weights, *(phase.weights for phase in cfg.data.phases)]
    named = {name: None for weights in mixtures for name, weight in weights.items() if weight}
    catalogue.require(named)
    sources = [catalogue.open_train(name) for name in named or catalogue.train]
    if not any(source.num_tokens > 1 for source in sources):
        raise DataError("data: there is no source with tokens to score; set data.weights")
    return sources


def _check_fit(cfg: RunConfig, catalogue: Catalogue, trained: Trained) -> None:
    longest = trained.model_cfg.max_seq_len or 0
    if longest < cfg.data.seq_len:
        raise ConfigError(
            f"data.seq_len: {trained.path} reads at most {longest} tokens and the samples have "
            f"{cfg.data.seq_len}; score with another model, or shorten the samples"
        )
    theirs, ours = trained.model_cfg.vocab_size or 0, catalogue.vocab_size
    if ours is not None and theirs != ours and cfg.model.vocab_size is None:
        raise ConfigError(
            f"{trained.path} has a vocabulary of {theirs} tokens and the data's tokenizer {ours}; "
            "score with a model trained with the same tokenizer"
        )


def _summary(header: dict[str, Any], file: Path) -> list[str]:
    """Spread of the scores, by source."""
    lines = []
    for name in header["sources"] if header["method"] != LOSSES else ():
        scores = read_scores(file, name)
        known = scores[np.isfinite(scores)]
        text = "none that counts"
        if len(known):
            low, middle, high = (float(v) for v in np.quantile(known, (0.05, 0.5, 0.95)))
            assert math.isfinite(middle)
            text = f"median {middle:.4g}, 5% below {low:.4g}, 5% above {high:.4g}"
        lines.append(f"  {name}: {len(scores):,} samples, {text}")
    return [*lines, f"written: {file}"]
