"""A prepared corpus on disk: its manifest, the settings it was made with, and how it is published.

While a corpus is made, everything lies in ``OUT/.partial``; publishing moves it up and writes
``OUT/manifest.json`` last. A folder with a manifest is complete, and one without is not a corpus.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from llmtrain.config.schema import PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.chat import template_text
from llmtrain.data.mds_writer import MAX_SHARD_BYTES, zstd_level
from llmtrain.data.sources import TextSource
from llmtrain.data.tokenizer import CONFIG_FILE, FILE, TEMPLATE_FILE, load_tokenizer
from llmtrain.errors import ConfigError, DataError, EnvironmentFault

MANIFEST = "manifest.json"
PARTIAL = ".partial"
SPLITS = ("train", "heldout")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_prepare(cfg: PrepareConfig) -> None:
    """Raise ConfigError for what the schema cannot see."""
    if not cfg.sources:
        raise ConfigError("prepare.sources is empty; name at least one source of text")
    for name in cfg.sources:
        if not _NAME.fullmatch(name) or name in (MANIFEST, FILE, CONFIG_FILE, TEMPLATE_FILE):
            raise ConfigError(
                f"prepare.sources: {name!r} becomes a folder; use letters, digits, '.', '_', '-'"
            )
    if cfg.shard_bytes > MAX_SHARD_BYTES:
        raise ConfigError(f"prepare.shard_bytes must be at most {MAX_SHARD_BYTES}")
    zstd_level(cfg.compression)
    if cfg.tokenizer.kind == "file" and not cfg.tokenizer.path:
        raise ConfigError("prepare.tokenizer.path is missing; kind file needs one")


def settings_of(cfg: PrepareConfig, sources: Mapping[str, TextSource]) -> dict[str, Any]:
    """All that the bytes of the corpus depend on, as JSON."""
    tokenizer = asdict(cfg.tokenizer)
    if cfg.tokenizer.kind == "file":
        loaded = load_tokenizer(str(cfg.tokenizer.path), cfg.tokenizer.eos_token)
        tokenizer["sha256"] = loaded.sha256
    settings = {
        "sources": {
            name: {**_source_settings(cfg.sources[name], cfg.tokenizer), **source.identity()}
            for name, source in sources.items()
        },
        "tokenizer": tokenizer,
        "heldout_fraction": cfg.heldout_fraction,
        "shard_bytes": cfg.shard_bytes,
        "compression": cfg.compression,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _source_settings(cfg: TextSourceConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Without filters or chat none are named: corpora made before there were any stay good."""
    settings = asdict(cfg)
    if cfg.chat is None:
        del settings["chat"]
    else:
        text = template_text(cfg.chat, tokenizer) or ""
        settings["chat"]["template_xxh64"] = xxhash.xxh64(text.encode()).hexdigest()
    if not settings["keep"]:
        del settings["keep"]
    return settings


def differences(old: Any, new: Any, path: str = "prepare") -> list[str]:
    """``key was X, now Y`` for every leaf in which two JSON trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}")
        return found
    if old == new:
        return []
    was, now = ("absent" if v is None else _short(v) for v in (old, new))
    return [f"{path} was {was}, now {now}"]


def _short(value: Any) -> str:
    text = "{...}" if isinstance(value, dict) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_manifest(corpus: str | Path) -> dict[str, Any] | None:
    """The manifest of a corpus folder, None where there is none; DataError if it is damaged."""
    path = Path(corpus).expanduser() / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or "sources" not in manifest:
            raise ValueError("it lacks its sources")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}); prepare the corpus again with --force"
        ) from error


@contextmanager
def disk_faults(out: Path) -> Iterator[None]:
    """Turns a full disk, a read-only folder and the like into one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentFault(
                f"no space left to write {where} ({error.strerror}); free some, or set prepare.out"
                " to another disk, and run the same command again: finished work is kept"
            ) from error
        raise EnvironmentFault(
            f"cannot write {where}: {error.strerror or error}; set prepare.out to a folder"
            " that can be written"
        ) from error


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Only one process at a time prepares into a folder. The lock dies with the process."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentFault(
                f"another process is preparing {partial.parent}; wait for it or stop it"
            ) from error
        yield


def publish(out: Path) -> None:
    """Move the finished corpus from ``OUT/.partial`` to ``OUT``.

    Killed at any point and called again it ends the same way: the manifest goes first (a corpus
    being replaced is no longer complete) and comes last.
    """
    partial = out / PARTIAL
    ready = json.loads((partial / MANIFEST).read_bytes())
    stale = {*ready["sources"], *json.loads((partial / "replaces.json").read_bytes())}
    (out / MANIFEST).unlink(missing_ok=True)
    for name in sorted(stale):
        fresh = partial / "sources" / name
        if name not in ready["sources"] or fresh.exists():
            shutil.rmtree(out / name, ignore_errors=True)
        if fresh.exists():
            os.rename(fresh, out / name)
    if not (partial / TEMPLATE_FILE).exists() and (partial / FILE).exists():
        (out / TEMPLATE_FILE).unlink(missing_ok=True)  # of the corpus that is replaced
    for name in (FILE, CONFIG_FILE, TEMPLATE_FILE, MANIFEST):
        if (partial / name).exists():
            os.replace(partial / name, out / name)
    (partial / "settings.json").unlink(missing_ok=True)  # nothing in it can be continued now
    shutil.rmtree(partial)
