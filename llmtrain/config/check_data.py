"""Rules between the keys of ``data`` and ``prepare``."""

from __future__ import annotations

import re

from llmtrain.config.data_methods import DietConfig
from llmtrain.config.duration import Duration
from llmtrain.config.faults import Collector, did_you_mean, listing
from llmtrain.config.length import part_of_run
from llmtrain.config.phase_ends import end_text, phase_end
from llmtrain.config.schema import PhaseConfig, PrepareConfig, RunConfig, TextSourceConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMPRESSION = re.compile(r"zstd(:([1-9]|1[0-9]|2[0-2]))?")
_RUN_LENGTH = ("train.duration", "train.global_batch_size", "data.seq_len")


def check_data(cfg: RunConfig, faults: Collector, for_training: bool) -> None:
    """The mixture, its sources and the held-out sets."""
    data = cfg.data
    if data.weights and data.phases:
        faults.add(
            "data.weights",
            "stands beside data.phases; keep one (weights is one phase for the whole run)",
            "data.phases",
        )
    elif for_training and not data.weights and not data.phases:
        example = f"{next(iter(data.sources), 'code')}: 1"
        faults.add(
            "data.weights",
            f"is missing: no mixture is given; write data.weights: {{{example}}} or data.phases",
            "data.phases",
        )
    if data.corpus is not None and not data.corpus.strip():
        faults.add("data.corpus", "is empty; name a prepared folder, or write null")
    _check_sources(cfg, faults)
    if data.weights:
        _check_weights(cfg, "data.weights", data.weights, faults)
    for i, phase in enumerate(data.phases):
        _check_weights(cfg, f"data.phases.{i}.weights", phase.weights, faults)
    if data.phases:
        _check_phases(cfg, data.phases, faults)
    if data.diet is not None:
        _check_diet(cfg, data.diet, faults)
    if data.replay is not None and not data.replay.run.strip():
        faults.add("data.replay.run", "is missing; name the folder of the earlier run")
    if data.replay is not None and cfg.online is not None:
        message = "keeps a fixed part, but online changes the weights of all sources; keep one"
        faults.add("data.replay", message, "online")
    if for_training and cfg.eval.prompts and data.corpus is None and data.tokenizer is None:
        faults.add(
            "eval.prompts",
            "need a tokenizer; set data.tokenizer or data.corpus",
            "data.tokenizer",
            "data.corpus",
        )


def _check_diet(cfg: RunConfig, diet: DietConfig, faults: Collector) -> None:
    batch = cfg.train.global_batch_size
    if diet.samples % batch or not diet.samples:
        message = f"{diet.samples} is no multiple of the global batch of {batch}; round it up"
        faults.add("data.diet.samples", message, "train.global_batch_size")
    if part_of_run(cfg, diet.until) > 1:
        message = f"{diet.until} is after the end of the run; make it earlier"
        faults.add("data.diet.until", message, *_RUN_LENGTH)
    tokens = batch * cfg.data.seq_len
    drawn = diet.until.steps(tokens, cfg.train.duration.steps(tokens)) * batch
    if diet.samples >= drawn:
        message = f"{diet.samples} samples are not repeated by the {drawn} that the run draws "
        message += (
            f"until {diet.until}; use fewer or a later data.diet.until, or set data.diet=null"
        )
        faults.add("data.diet.samples", message, "data.diet.until", *_RUN_LENGTH)
    if cfg.online is not None:
        message = "repeats samples of an order that online makes as it goes; keep one"
        faults.add("data.diet", message, "online")


def _check_sources(cfg: RunConfig, faults: Collector) -> None:
    for section, sources in (("sources", cfg.data.sources), ("heldout", cfg.data.heldout)):
        for name, source in sources.items():
            path = ("data", section, name)
            _check_name(name, path, faults)
            if not source.path and cfg.data.corpus is None:
                faults.add(
                    (*path, "path"),
                    "is missing; name the source's folder, file or address, or set data.corpus",
                    "data.corpus",
                )


def _check_name(name: str, path: tuple[str, ...], faults: Collector) -> None:
    if not _NAME.fullmatch(name):
        message = "becomes the name of a folder; use letters, digits, '.', '_' and '-'"
        faults.add(path, message)


def _known_sources(cfg: RunConfig) -> set[str] | None:
    """Names that weights may use; None when only the corpus on disk knows."""
    names = set(cfg.data.sources)
    if cfg.data.replay is not None:
        return None
    if cfg.data.corpus is None:
        return names
    if cfg.prepare is not None and cfg.prepare.out == cfg.data.corpus:
        return names | set(cfg.prepare.sources)
    return None


def _check_weights(cfg: RunConfig, key: str, weights: dict[str, float], faults: Collector) -> None:
    """Weights name sources that exist, and at least one counts."""
    if not any(weights.values()):
        what = "are all zero" if weights else "are missing"
        faults.add(key, f"the weights {what}; give at least one source a share")
    known = _known_sources(cfg)
    if known is not None:
        for name in weights:
            if name not in known:
                have = f"the sources are {listing(sorted(known))}" if known else ""
                remedy = did_you_mean(name, known, have or "declare it under data.sources")
                faults.add(
                    (*key.split("."), name),
                    f"there is no source of this name; {remedy}",
                    "data.sources",
                    "data.corpus",
                    "prepare",
                )
    used = [name for name, weight in weights.items() if weight > 0]
    if used and all(n in cfg.data.sources and not cfg.data.sources[n].loss_weight for n in used):
        faults.add(
            key,
            "every source has loss_weight 0, so nothing would be learned; raise one",
            "data.sources",
        )


def _check_phases(cfg: RunConfig, phases: list[PhaseConfig], faults: Collector) -> None:
    """Phases end one after the other, the last with the run."""
    seq_len, batch = cfg.data.seq_len, cfg.train.global_batch_size
    total = cfg.train.duration.steps(seq_len * batch)
    start = 0
    for i, phase in enumerate(phases):
        key = f"data.phases.{i}.until"
        end = phase_end(cfg, phase, total)
        last = i == len(phases) - 1
        if phase.until_lr is not None:
            _check_until_lr(cfg, i, last, faults)
        if last and phase.until.steps(seq_len * batch, total) != total:
            faults.add(
                key,
                f"{phase.until} is not the end of the run ({cfg.train.duration}); the last phase "
                "must reach it: write 1dur",
                *_RUN_LENGTH,
            )
        elif end <= start:
            faults.add(
                key,
                f"{end_text(phase)} is not after the phase before it (until "
                f"{end_text(phases[i - 1])}); put phases in the order of their ends",
                *_RUN_LENGTH,
                "data.phases",
            )
        elif not last and end >= total * batch:
            faults.add(
                key,
                f"{end_text(phase)} leaves nothing for the phases after it (the run lasts "
                f"{cfg.train.duration}); end it earlier",
                *_RUN_LENGTH,
                "data.phases",
            )
        else:
            start = end
    if phases[0].ramp == "linear":
        faults.add(
            "data.phases.0.ramp",
            "the first phase has no weights to ramp from; use step",
        )


def _check_until_lr(cfg: RunConfig, i: int, last: bool, faults: Collector) -> None:
    """A phase that ends where the learning rate has fallen so far."""
    key, depends = (
        f"data.phases.{i}.until_lr",
        ("data.phases", "schedule.restarts", "schedule.name"),
    )
    if last:
        faults.add(key, "the last phase ends with the run; leave until_lr away", *depends)
    elif cfg.data.phases[i].until != Duration.parse("1dur"):
        faults.add(key, f"stands beside data.phases.{i}.until; keep one", *depends)
    if cfg.schedule.restarts:
        message = "cannot be told with schedule.restarts, which pass it more than once; use until"
        faults.add(key, message, *depends)


def check_prepare(cfg: RunConfig, faults: Collector) -> None:
    """Sources of text and the tokenizer."""
    prepare = cfg.prepare
    if prepare is None:
        return
    if not prepare.out.strip():
        faults.add("prepare.out", "is empty; name the folder to write")
    if not prepare.sources:
        faults.add("prepare.sources", "is missing; name at least one source of text")
    for name, source in prepare.sources.items():
        _check_name(name, ("prepare", "sources", name), faults)
        _check_text_source(source, ("prepare", "sources", name), faults)
        wants = source.chat is not None and source.chat.template == "tokenizer"
        if wants and prepare.tokenizer.kind != "file":
            faults.add(
                ("prepare", "sources", name, "chat", "template"),
                "tokenizer needs one that brings a template; set prepare.tokenizer.kind: file",
                "prepare.tokenizer.kind",
            )
    if prepare.compression and not _COMPRESSION.fullmatch(prepare.compression):
        faults.add(
            "prepare.compression",
            f"{prepare.compression!r} is not known; write zstd, zstd:1 to zstd:22, or null",
        )
    _check_tokenizer(cfg, prepare, faults)


def _check_text_source(source: TextSourceConfig, path: tuple[str, ...], faults: Collector) -> None:
    """Each kind has the keys it reads and none that it ignores."""
    kind = (*path, "kind")
    needs = {"builtin": "domain", "hf": "hf_name"}.get(source.kind, "paths")
    examples = {
        "domain": "code, docs or math",
        "hf_name": "the name or local path of a dataset",
        "paths": "a list of files, folders or globs",
    }
    given = {"domain": source.domain, "hf_name": source.hf_name, "paths": source.paths}
    if not given[needs]:
        message = f"is missing; kind {source.kind} needs it: {examples[needs]}"
        faults.add((*path, needs), message, kind)
    if source.keep and source.kind in ("builtin", "text"):
        message = f"is not read by kind {source.kind}, whose documents have no fields; remove it"
        faults.add((*path, "keep"), message, kind)
    if source.chat is not None:
        _check_chat(source, path, faults)
    for name, rule in source.keep.items():
        here = (*path, "keep", name)
        if rule.min is not None and rule.max is not None and rule.min > rule.max:
            faults.add(here, f"keeps nothing: min {rule.min:g} is above max {rule.max:g}")
        asks = rule.min is not None or rule.max is not None or rule.one_of or rule.none_of
        if not asks and rule.missing == "keep":
            faults.add(here, "drops nothing; give it min, max, one_of or none_of")
    owners = {"domain": "builtin", "hf_name": "hf", "paths": "text, jsonl or parquet"}
    for key, value in given.items():
        if value and key != needs:
            message = f"is not read by kind {source.kind}; set kind: {owners[key]}, or remove it"
            faults.add((*path, key), message, kind)


def _check_chat(source: TextSourceConfig, path: tuple[str, ...], faults: Collector) -> None:
    """Conversations come from records with fields, and something of them is trained."""
    chat, here = source.chat, (*path, "chat")
    assert chat is not None
    if source.kind in ("builtin", "text"):
        message = f"is not read by kind {source.kind}, whose documents have no fields; remove it"
        faults.add(here, message, (*path, "kind"))
    if chat.train_on == "roles" and not any(chat.role_weights.values()):
        message = "give no role a weight, so nothing would be learned; write {assistant: 1}"
        faults.add((*here, "role_weights"), message, (*here, "train_on"))
    if chat.train_on != "roles" and chat.role_weights:
        message = f"is not read with train_on {chat.train_on}; set train_on: roles, or remove it"
        faults.add((*here, "role_weights"), message, (*here, "train_on"))
    if len({*chat.role_weights.values()}) > 100:
        faults.add((*here, "role_weights"), "has more than 100 different weights; round them")
    if chat.window is None and not chat.pack:
        faults.add((*here, "pack"), "needs a window: the length of a sample", (*here, "window"))
    if not chat.template.strip():
        faults.add((*here, "template"), "is empty; write plain, tokenizer or a file's path")


def _check_tokenizer(cfg: RunConfig, prepare: PrepareConfig, faults: Collector) -> None:
    tokenizer = prepare.tokenizer
    kind = "prepare.tokenizer.kind"
    if tokenizer.kind == "file" and not tokenizer.path:
        message = "is missing; kind file needs a tokenizer.json or a folder that holds one"
        faults.add("prepare.tokenizer.path", message, kind)
    if tokenizer.kind != "file" and tokenizer.path:
        message = f"is not read by kind {tokenizer.kind}; set kind: file, or remove it"
        faults.add("prepare.tokenizer.path", message, kind)
    if tokenizer.eos_token == "":
        faults.add("prepare.tokenizer.eos_token", "is empty; documents need a separator")
    size, wanted = cfg.model.vocab_size, {"bpe": tokenizer.vocab_size, "byte": 257}
    need = wanted.get(tokenizer.kind, 0)
    if size is not None and size < need and cfg.data.corpus == prepare.out:
        faults.add(
            "model.vocab_size",
            f"{size} is smaller than the tokenizer's {need}; leave it null to follow",
            kind,
            "prepare.tokenizer.vocab_size",
        )
