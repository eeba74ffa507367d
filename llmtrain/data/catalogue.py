"""The sources a config can name: those of its corpus and those it lists itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.config.faults import did_you_mean
from llmtrain.config.schema import RunConfig, SourceConfig
from llmtrain.data.corpus import read_manifest
from llmtrain.data.formats import open_source
from llmtrain.data.replay import Replay, open_replay
from llmtrain.data.source import TokenSource
from llmtrain.data.tokenizer import CONFIG_FILE, TEMPLATE_FILE, load_tokenizer
from llmtrain.errors import DataError


@dataclass
class Catalogue:
    """Source configs by name, for training and held out, and what is known of the tokenizer.

    bytes_per_token: of held-out sources that a corpus counted.
    """

    train: dict[str, SourceConfig]
    heldout: dict[str, SourceConfig]
    bytes_per_token: dict[str, float]
    eos_id: int | None
    vocab_size: int | None
    tokenizer_path: Path | None
    manifest: dict[str, Any] = field(default_factory=dict)
    replay: Replay | None = None
    seq_len: int | None = None  # of the run's samples

    def require(self, names: Iterable[str]) -> None:
        """Raise DataError for the first name that is no source."""
        for name in names:
            if name not in self.train:
                hint = did_you_mean(name, self.train, f"the sources are {', '.join(self.train)}")
                raise DataError(f"data: weights name the source {name!r}, which is unknown; {hint}")

    def unigram_losses(self) -> dict[str, float]:
        """Held-out nats per token of a model that knows token frequencies only, by source."""
        found: dict[str, float] = {}
        for name, entry in self.manifest.get("sources", {}).items():
            value = entry["heldout"].get("unigram_loss_nats")
            if value is not None and entry["heldout"]["tokens"] and name in self.heldout:
                found[name] = float(value)
        return found

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, for checkpoints; empty without a tokenizer.

        Raises DataError when tokenizer.json is gone.
        """
        if self.tokenizer_path is None:
            return {}
        path = self.tokenizer_path
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"the tokenizer {file} is missing; put it back, prepare the corpus again, or set "
                "data.tokenizer"
            )
        found = {"tokenizer.json": file.read_bytes()}
        for name in (CONFIG_FILE, TEMPLATE_FILE):
            beside = file.with_name(name)
            if beside.is_file():
                found[name] = beside.read_bytes()
        return found

    def open_train(self, name: str) -> TokenSource:
        """The token stream to train on."""
        return self._open(name, self.train[name])

    def open_heldout(self, name: str) -> TokenSource:
        """The held-out token stream."""
        return self._open(name, self.heldout[name])

    def _open(self, name: str, config: SourceConfig) -> TokenSource:
        source = open_source(name, config, eos_id=self.eos_id)
        if source.window and self.seq_len and self.seq_len % source.window:
            raise DataError(
                f"source {name!r} keeps its conversations whole in windows of {source.window} "
                f"tokens, which samples of {self.seq_len} would cut; set data.seq_len to a multiple"
                " of the window, or prepare it with another chat.window"
            )
        return source


def open_catalogue(cfg: RunConfig) -> Catalogue:
    """Read the corpus' manifest and the config. Raises DataError when the corpus is missing."""
    data = cfg.data
    train: dict[str, SourceConfig] = {}
    heldout: dict[str, SourceConfig] = {}
    per_token: dict[str, float] = {}
    manifest: dict[str, Any] = {}
    tokenizer = Path(data.tokenizer) if data.tokenizer else None
    if data.corpus is not None:
        known = read_manifest(data.corpus)
        if known is None:
            raise DataError(
                f"data.corpus: {data.corpus} holds no prepared corpus; make it with "
                "`llmtrain data prepare CONFIG`"
            )
        manifest, root = known, Path(data.corpus)
        tokenizer = tokenizer or root / "tokenizer.json"
        for name, entry in manifest["sources"].items():
            train[name] = SourceConfig(path=str(root / name / "train"), format="mds")
            held = entry["heldout"]
            if held["tokens"]:
                heldout[name] = SourceConfig(path=str(root / name / "heldout"), format="mds")
                if "weights" not in held:  # else the loss is not one per token of the text
                    per_token[name] = held["bytes"] / held["tokens"]
    for name, source in data.sources.items():
        if not source.path and name not in train:
            hint = did_you_mean(name, train, "give it a path, or remove it")
            raise DataError(f"data.sources.{name}: has no path, and no source is called so; {hint}")
        path = source.path or train.get(name, source).path
        train[name] = dataclasses.replace(source, path=path)
    heldout.update(data.heldout)
    for name in data.heldout:
        per_token.pop(name, None)
    eos, vocab = data.eos_id, cfg.model.vocab_size
    if manifest:
        eos = manifest["tokenizer"]["eos_id"] if eos is None else eos
        vocab = manifest["tokenizer"]["vocab_size"]
    if tokenizer is not None and (not manifest or data.tokenizer):
        loaded = load_tokenizer(tokenizer)
        eos, vocab = loaded.eos_id if eos is None else eos, loaded.vocab_size
    if eos is None and (data.document_mask or data.reset_positions):
        raise DataError(
            "data.document_mask and data.reset_positions need to know where documents end; set "
            "data.eos_id, or data.tokenizer, or data.corpus"
        )
    found = Catalogue(train, heldout, per_token, eos, vocab, tokenizer, manifest)
    found.seq_len = data.seq_len
    if data.replay is not None:
        found.replay = open_replay(cfg, found)
    return found
