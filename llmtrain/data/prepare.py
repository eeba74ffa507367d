"""``llmtrain data prepare``: text to a corpus of MDS shards.

Each finished source, and from time to time the position inside the current one, is recorded in
``OUT/.partial``. Killed and run again, the same command goes on from there and ends with the same
bytes: the input is read again up to the position, but not tokenized.
"""

from __future__ import annotations

import io
import json
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llmtrain.config.schema import PrepareConfig
from llmtrain.data.chat import Chat, shared_template, special_names
from llmtrain.data.corpus import (
    MANIFEST,
    PARTIAL,
    SPLITS,
    check_prepare,
    differences,
    disk_faults,
    locked,
    publish,
    read_manifest,
    settings_of,
)
from llmtrain.data.encode import Encoder, batches, is_heldout
from llmtrain.data.mds_writer import write_file
from llmtrain.data.progress import Progress, human
from llmtrain.data.sources import BadTally, Document, TextSource, documents, open_text_source
from llmtrain.data.sources.base import check_text
from llmtrain.data.stream_writer import StreamWriter, Weighting, unigram_loss
from llmtrain.data.tokenizer import (
    CONFIG_FILE,
    DEFAULT_EOS,
    FILE,
    TEMPLATE_FILE,
    Tokenizer,
    byte_tokenizer_file,
    load_tokenizer,
    tokenizer_config_file,
    train_tokenizer,
)
from llmtrain.errors import DataError
from llmtrain.machine import usable_cores

SAVE_SECONDS = 5.0

Say = Callable[[str], None]
Json = dict[str, Any]


def prepare(
    cfg: PrepareConfig, *, workers: int | None = None, force: bool = False, say: Say = print
) -> Json:
    """Make the corpus that ``cfg`` describes and return its manifest.

    A complete corpus with the same settings is left alone; with others it is an error unless
    ``force``, which replaces it once the new one is complete. ``workers`` overrides
    ``cfg.workers``; it never changes the result. More than one are spawned, so a script that
    calls this needs ``if __name__ == "__main__":``. Raises ConfigError, DataError (input) and
    EnvironmentFault (disk, memory), each with one sentence.
    """
    check_prepare(cfg)
    out = Path(cfg.out).expanduser()
    sources = {name: open_text_source(name, one) for name, one in cfg.sources.items()}
    settings = settings_of(cfg, sources)
    old = _standing(out, settings, force)
    if old is not None and not force:
        say(f"{out} is already complete, nothing to do (--force makes it anew)")
        if (out / PARTIAL).exists():  # killed while cleaning up
            with disk_faults(out), locked(out / PARTIAL):
                shutil.rmtree(out / PARTIAL)
        return old
    with disk_faults(out), locked(out / PARTIAL):
        _begin(out, settings, say)
        if not (out / PARTIAL / MANIFEST).exists():
            count = workers or cfg.workers or usable_cores()
            manifest = _make(cfg, sources, settings, count, say)
            replaced = list(old["sources"]) if old else []
            write_file(out / PARTIAL / "replaces.json", json.dumps(replaced).encode())
            write_file(out / PARTIAL / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        publish(out)
    done = read_manifest(out)
    assert done is not None
    return done


def _standing(out: Path, settings: Json, force: bool) -> Json | None:
    """The complete corpus in ``out``, if any; DataError where it may not be touched."""
    try:
        manifest = read_manifest(out)
    except DataError:
        if not force:
            raise
        return {"sources": {}}
    if manifest is not None:
        changed = differences(manifest.get("settings"), settings)
        if changed and not force:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise DataError(
                f"{out} holds a corpus made with other settings ({'; '.join(changed[:3])}{more});"
                " choose another prepare.out, or replace it with --force"
            )
        return manifest
    if out.is_dir() and not (out / PARTIAL).exists() and any(out.iterdir()):
        raise DataError(f"{out} holds files that are no corpus; set prepare.out to a new folder")
    return None


def _begin(out: Path, settings: Json, say: Say) -> None:
    """Keep what an interrupted run with the same settings left; discard anything else."""
    partial = out / PARTIAL
    wanted = json.dumps(settings, sort_keys=True, indent=1).encode()
    note = partial / "settings.json"
    if note.exists():
        if note.read_bytes() == wanted:
            say(f"continuing the interrupted preparation of {out}")
            return
        say(f"discarding an interrupted preparation of {out} that had other settings")
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    write_file(note, wanted)


def _make(
    cfg: PrepareConfig, sources: Mapping[str, TextSource], settings: Json, workers: int, say: Say
) -> Json:
    """Tokenizer, then every source that is not yet finished; the manifest."""
    partial = Path(cfg.out).expanduser() / PARTIAL
    (partial / "done").mkdir(exist_ok=True)
    tokenizer = _tokenizer(cfg, partial, say)
    entries: dict[str, Json] = {}
    encoder = Encoder(partial / FILE, tokenizer.eos_token, cfg.heldout_fraction, workers)
    with encoder:
        for name, source in sources.items():
            done = partial / "done" / f"{name}.json"
            if done.exists():
                entries[name] = json.loads(done.read_bytes())
                continue
            start = time.monotonic()
            entries[name] = _Preparation(cfg, source, tokenizer, partial, say).run(encoder)
            write_file(done, json.dumps(entries[name]).encode())
            say(_summary(name, entries[name], time.monotonic() - start))
    manifest: Json = {"version": 1}
    manifest["tokenizer"] = {
        "kind": tokenizer.kind,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "eos_token": tokenizer.eos_token,
    }
    manifest["sources"] = entries
    manifest["heldout_fraction"] = cfg.heldout_fraction
    if any(one.kind == "builtin" for one in cfg.sources.values()):
        manifest["python"] = platform.python_version()
    manifest["settings"] = settings
    return manifest


def _tokenizer(cfg: PrepareConfig, partial: Path, say: Say) -> Tokenizer:
    """The corpus's tokenizer, trained, loaded or made, and its files in ``partial``."""
    want, file = cfg.tokenizer, partial / FILE
    if not file.exists():
        eos = want.eos_token or DEFAULT_EOS
        if want.kind == "byte":
            content = byte_tokenizer_file(eos)
        elif want.kind == "file":
            given = Path(str(want.path)).expanduser()
            eos = load_tokenizer(given, want.eos_token).eos_token
            content = (given / FILE if given.is_dir() else given).read_bytes()
        else:
            start = time.monotonic()
            content = train_tokenizer(_sample(cfg), want.vocab_size, eos)
            say(f"trained a tokenizer in {time.monotonic() - start:.1f} s")
        names: dict[str, str] = {}
        if (template := shared_template(cfg)) is not None:
            names = special_names(cfg.tokenizer, eos)
            write_file(partial / TEMPLATE_FILE, template.encode())
        write_file(partial / CONFIG_FILE, tokenizer_config_file(eos, names))
        write_file(file, content)
    return load_tokenizer(file)


def _sample(cfg: PrepareConfig) -> Iterator[str]:
    """Text to train the tokenizer on: an equal share of each source, nothing held out.

    The files of a source contribute alike, in an order that has nothing to do with their names'.
    """
    left = cfg.tokenizer.train_bytes
    for number, (name, section) in enumerate(cfg.sources.items()):
        source = open_text_source(name, section)
        parts = sorted(source.parts(), key=lambda part: xxhash.xxh64(part.encode()).intdigest())
        budget = min(left // (len(cfg.sources) - number), section.max_bytes or left)
        for index, part in enumerate(parts):
            if budget <= 0:
                break
            share = budget // (len(parts) - index)
            with closing(_good(source, part, cfg.heldout_fraction)) as texts:
                for text in islice(texts, section.max_documents):
                    size = len(text.encode())
                    share, budget, left = share - size, budget - size, left - size
                    yield text
                    if share <= 0:
                        break


def _good(source: TextSource, part: str, fraction: float) -> Generator[str]:
    for record in source.records(part):
        good = check_text(record)
        if isinstance(good, Document) and not is_heldout(good.split_key or good.text, fraction):
            yield good.text


class _Preparation:
    """One source on its way to two MDS folders."""

    def __init__(
        self, cfg: PrepareConfig, source: TextSource, tokenizer: Tokenizer, partial: Path, say: Say
    ) -> None:
        self.source = source
        self.tally = BadTally(source.name, cfg.max_bad_fraction, say)
        self.say = say
        self.state_file = partial / f"state-{source.name}.npz"
        folder = partial / "sources" / source.name
        section = source.cfg.chat
        self.chat = Chat(section, cfg.tokenizer, tokenizer) if section is not None else None
        self.window = section.window if section is not None else None
        how = None
        if section is not None and self.chat is not None:
            how = Weighting(self.chat.table, section.window, section.pack)
        self.writers = {
            split: StreamWriter(folder / split, tokenizer, cfg.shard_bytes, cfg.compression, how)
            for split in SPLITS
        }
        self.taken = 0  # documents that are in the writers, or were longer than a window
        self.long = 0
        self._shards = 0
        self._saved_at = time.monotonic()

    def run(self, encoder: Encoder) -> Json:
        """Tokenize and write; the manifest's entry of the source."""
        self._resume()
        good = islice(documents(self.source, self.tally, self.chat), self.taken, None)
        with Progress(self.source.name, self.source.total_bytes, self.say) as progress:
            for encoded in encoder.run(batches(good), self.window):
                self.taken += encoded.taken
                self.long += encoded.long
                for split in SPLITS:
                    self.writers[split].add(*getattr(encoded, split))
                self._save()
                tokens = sum(writer.tokens for writer in self.writers.values())
                progress.update(self.source.bytes_read, self.taken, tokens)
        train, heldout = (self.writers[split] for split in SPLITS)
        if not train.documents:
            gone = sum(self.tally.dropped.values())
            why = f" (its filters dropped {gone:,} of {self.tally.records:,})" if gone else ""
            if self.long:
                why += f" ({self.long:,} are longer than the window of {self.window:,} tokens)"
            raise DataError(
                f"source {self.source.name!r} has no documents to train on{why}; give it more text"
            )
        entry: Json = {split: self.writers[split].finish() for split in SPLITS}
        if self.chat is None:  # else a loss over some of the tokens only
            nats = unigram_loss(heldout.histogram, train.histogram)
            entry["heldout"]["unigram_loss_nats"] = nats
        entry["bad"] = self.tally.counts()
        if self.source.cfg.keep:
            entry["dropped"] = dict(sorted(self.tally.dropped.items()))
        if self.window is not None:
            entry["long"] = self.long
        return entry

    def _save(self) -> None:
        """Record the position when new shards are on disk, not more often than worth it."""
        shards = sum(len(writer.shards.shards) for writer in self.writers.values())
        now = time.monotonic()
        if shards == self._shards or now - self._saved_at < SAVE_SECONDS:
            return
        self._shards, self._saved_at = shards, now
        plain: Json = {"taken": self.taken, "long": self.long}
        arrays: dict[str, Any] = {}
        for split, writer in self.writers.items():
            plain[split], parts = writer.state()
            arrays.update({f"{split}.{key}": array for key, array in parts.items()})
        arrays["plain"] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_file(self.state_file, buffer.getvalue())

    def _resume(self) -> None:
        if not self.state_file.exists():
            return
        with np.load(self.state_file, allow_pickle=False) as saved:
            plain = json.loads(saved["plain"].tobytes())
            for split, writer in self.writers.items():
                keys = ("open", "histogram", "marks")[: 3 if self.chat is not None else 2]
                writer.restore(plain[split], {key: saved[f"{split}.{key}"] for key in keys})
        self.taken, self.long = plain["taken"], plain.get("long", 0)
        self.say(f"{self.source.name}: continuing after {self.taken:,} documents")


def _summary(name: str, entry: Json, seconds: float) -> str:
    train, heldout = entry["train"], entry["heldout"]
    bad = sum(entry["bad"].values()) - entry["bad"]["records"]
    words = [
        f"{name}: {train['documents']:,} documents, {human(train['tokens'])} tokens"
        f" ({train['bytes'] / max(train['tokens'], 1):.2f} bytes each)",
        f"held out {heldout['documents']:,} documents, {human(heldout['tokens'])} tokens",
    ]
    if "trained" in train:
        words.append(f"{human(train['trained'])} of the tokens trained on")
    if entry.get("long"):
        words.append(f"{entry['long']:,} longer than a window dropped")
    if bad:
        words.append(f"{bad:,} of {entry['bad']['records']:,} records bad")
    if dropped := entry.get("dropped"):
        parts = ", ".join(f"{number:,} by {why}" for why, number in dropped.items())
        words.append(f"filters dropped {sum(dropped.values()):,} ({parts})")
    if not heldout["documents"]:
        words.append("raise prepare.heldout_fraction to hold some out")
    return ", ".join(words) + f" [{seconds:.1f} s]"
