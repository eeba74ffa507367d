"""A checkpoint of ours from a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmtrain
from llmtrain.checkpoint import MODEL_PREFIX
from llmtrain.checkpoint.layout import (
    CHECKSUMS,
    META,
    TENSORS,
    Chunk,
    TensorLayout,
    checksums_text,
    layout_text,
)
from llmtrain.checkpoint.safefile import FileSum, write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.checkpoint.tensors import dtype_name
from llmtrain.config import RunConfig, from_dict, to_dict, to_yaml
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.architectures import Architecture, architecture_of
from llmtrain.convert.folder import CONFIG, ModelFolder, open_folder
from llmtrain.convert.names import HEADS, VOCABULARY, Rule, ignored, rules_for
from llmtrain.convert.writing import (
    SHARD_BYTES,
    Converted,
    Target,
    in_blocks,
    shards_of,
    write_file,
)
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.model import Decoder, complete

_LONGEST = 4096
_TRANSFORMER = "transformer."
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def from_huggingface(
    src: Path, dst: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Write the model in the Hugging Face folder ``src`` as a checkpoint ``dst``.

    dtype: of the stored weights; None: float32, which training keeps them in. At most the parts
    of one tensor are in memory. Raises CheckpointError for an unknown architecture, a setting or
    dtype that does not exist here, and tensors that are missing, unknown or of another shape;
    then nothing is written.
    """
    folder = open_folder(Path(src).expanduser())
    architecture = architecture_of(folder.config, str(folder.path / CONFIG))
    cfg, notes = _model_config(folder, architecture)
    rules = _found_names(folder, rules_for(architecture.name, cfg))
    shapes = _our_shapes(cfg)
    _check_tensors(folder, rules, shapes, cfg)
    files = folder.files()
    notes += _check_vocabulary(folder, cfg)
    with new_folder(Path(dst)) as temporary:
        writer = _OurWriter(folder, rules, shapes, cfg, dtype or torch.float32)
        sums = writer.write(temporary, shard_bytes)
        kept = _origin(folder, architecture)
        files |= _our_files(cfg, kept, writer.layout, Path(dst).name)
        sums += [write_small(temporary / name, data) for name, data in files.items()]
        write_small(temporary / CHECKSUMS, checksums_text(sums))
    size = sum(s.bytes for s in sums if s.name.endswith(".safetensors"))
    n_params = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Converted(Path(dst), architecture.name, n_params, size, notes)


def open_huggingface(src: Path) -> tuple[ModelFolder, ModelConfig, list[Rule]]:
    """An opened Hugging Face folder, its model resolved, and which of its tensors make up ours.

    Raises CheckpointError as ``from_huggingface`` does.
    """
    folder = open_folder(Path(src).expanduser())
    architecture = architecture_of(folder.config, str(folder.path / CONFIG))
    cfg, _ = _model_config(folder, architecture)
    rules = _found_names(folder, rules_for(architecture.name, cfg))
    _check_tensors(folder, rules, _our_shapes(cfg), cfg)
    return folder, cfg, rules


def _origin(folder: ModelFolder, architecture: Architecture) -> dict[str, Any]:
    """What the way back wants to know."""
    ids = {key: folder.config[key] for key in _IDS if folder.config.get(key) is not None}
    kind = dtype_name(folder.dtype(), "weights")
    source = str(folder.path.resolve())
    return {"architecture": architecture.name, "source": source, "dtype": kind, "ids": ids}


def _model_config(folder: ModelFolder, kind: Architecture) -> tuple[ModelConfig, list[str]]:
    try:
        raw = kind.read(folder.config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder.path / CONFIG}: {what}") from error
    notes = []
    positions = folder.config.get("max_position_embeddings")
    if positions is not None and raw.max_seq_len is not None and raw.max_seq_len < positions:
        notes.append(
            f"attention reaches {raw.max_seq_len} tokens back in this model (sliding_window); "
            "sequences up to that length are computed the same, longer ones are refused"
        )
    assert raw.max_seq_len is not None
    try:
        # The checkpoint's config.yaml will be read with these rules.
        from_dict(to_dict(_run_of(raw)))
        return complete(raw, None, min(raw.max_seq_len, _LONGEST)), notes
    except ConfigError as error:
        raise CheckpointError(f"{folder.path / CONFIG}: {error}") from error


def _found_names(folder: ModelFolder, rules: list[Rule]) -> list[Rule]:
    """GPT-2's first files have no ``transformer.`` in front of their names."""
    if any(name.startswith(_TRANSFORMER) for name in folder.entries):
        return rules
    return [
        replace(rule, theirs=tuple(name.removeprefix(_TRANSFORMER) for name in rule.theirs))
        for rule in rules
    ]


def _our_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Decoder(cfg)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def _their_shapes(rule: Rule, shape: tuple[int, ...], cfg: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the tensors one of ours is made of; the vocabulary is not padded there."""
    assert cfg.vocab_size is not None
    if rule.ours in VOCABULARY:
        shape = (cfg.vocab_size, *shape[1:])
    parts = rule.split(torch.empty(shape, device="meta"), cfg)
    return [tuple(part.shape) for part in parts]


def _check_tensors(
    folder: ModelFolder,
    rules: list[Rule],
    shapes: dict[str, tuple[int, ...]],
    cfg: ModelConfig,
) -> None:
    known = set()
    for rule in rules:
        wanted = _their_shapes(rule, shapes[rule.ours], cfg)
        for name, shape in zip(rule.theirs, wanted, strict=True):
            known.add(name)
            if folder.shape(name) != shape:
                raise CheckpointError(
                    f"{folder.path}: {name} is {list(folder.shape(name))} where {CONFIG} calls for "
                    f"{list(shape)}; config and weights are of different models"
                )
    unknown = sorted(n for n in folder.entries if n not in known and not ignored(n))
    if unknown:
        raise CheckpointError(
            f"{folder.path} holds {unknown[0]} ({len(unknown)} such tensors), which the "
            "architecture here has not; converting would change what the model computes"
        )
    missing = shapes.keys() - {rule.ours for rule in rules}
    assert not missing, missing
    embedding = next(rule.theirs[0] for rule in rules if rule.ours == "embedding.weight")
    for head in sorted(n for n in folder.entries if n not in known and n in HEADS):
        if not _equal(folder, head, embedding):
            raise CheckpointError(
                f"{folder.path}: {CONFIG} ties the head to the embedding (tie_word_embeddings), "
                f"and {head} is another matrix than {embedding}; write false there if the head "
                f"counts, as transformers 5 takes it, or take {head} out"
            )


def _equal(folder: ModelFolder, one: str, other: str) -> bool:
    """Whether two stored tensors are the same, a few rows at a time."""
    shape, n_rows = folder.shape(one), 1024
    return shape == folder.shape(other) and all(
        torch.equal(*(folder.read(n, i, min(n_rows, shape[0] - i)) for n in (one, other)))
        for i in range(0, shape[0], n_rows)
    )


def _check_vocabulary(folder: ModelFolder, cfg: ModelConfig) -> list[str]:
    assert cfg.vocab_size is not None
    if not (folder.path / "tokenizer.json").exists():
        return ["there is no tokenizer.json beside the weights, so text cannot be encoded"]
    try:
        tokenizer = load_tokenizer(folder.path)
    except DataError as error:
        return [str(error)]
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{folder.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model's "
            f"vocabulary {cfg.vocab_size}; they do not belong together"
        )
    return []


class _OurWriter:
    """Writes our files of weights. layout: what lies where, filled by ``write``."""

    def __init__(
        self,
        folder: ModelFolder,
        rules: list[Rule],
        shapes: dict[str, tuple[int, ...]],
        cfg: ModelConfig,
        dtype: torch.dtype,
    ) -> None:
        self._folder, self._cfg = folder, cfg
        self._rules = {MODEL_PREFIX + rule.ours: rule for rule in rules}
        names = sorted(self._rules)
        self._targets = [Target(n, dtype, shapes[n.removeprefix(MODEL_PREFIX)]) for n in names]
        self.layout: dict[str, TensorLayout] = {}

    def write(self, folder: Path, shard_bytes: int) -> list[FileSum]:
        """All files of weights, in ``folder``."""
        shards = shards_of([[target] for target in self._targets], shard_bytes)
        sums = []
        for i, units in enumerate(shards):
            targets = [target for unit in units for target in unit]
            file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            sums.append(write_file(file, targets, map(self._values, targets)))
            for target in targets:
                chunk = Chunk((0,) * len(target.shape), target.shape, file.name)
                kind = dtype_name(target.dtype, target.name)
                self.layout[target.name] = TensorLayout(kind, target.shape, (chunk,))
        return sums

    def _values(self, target: Target) -> Iterator[Tensor]:
        rule = self._rules[target.name]
        joined = rule.join([self._folder.read(name) for name in rule.theirs], self._cfg)
        return in_blocks(joined, target.shape[0])


def _run_of(model: ModelConfig) -> RunConfig:
    """The config of a run of such a model."""
    run = RunConfig()
    assert model.max_seq_len is not None
    data = replace(run.data, seq_len=max(2, min(model.max_seq_len, run.data.seq_len)))
    return replace(run, model=model, data=data)


def meta_text(source: dict[str, Any]) -> str:
    """What a converted checkpoint's meta file says. source: what it was converted from."""
    meta = {
        "step": 0,
        "tokens": 0,
        "samples": 0,
        "permanent": True,
        "world_size": 1,
        "saved_at": time.time(),
        "llmtrain": llmtrain.__version__,
        "converted_from": source,
    }
    return json.dumps(meta, indent=1)


def _our_files(
    cfg: ModelConfig, source: dict[str, Any], layout: dict[str, TensorLayout], name: str
) -> dict[str, bytes]:
    run = replace(_run_of(cfg), name=name)
    return {
        "config.yaml": to_yaml(run).encode(),
        "data.json": json.dumps({"vocab_size": cfg.vocab_size}).encode(),
        META: meta_text(source).encode(),
        TENSORS: layout_text(layout),
    }
