"""A Hugging Face folder from a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import META, TensorLayout, read_layout
from llmtrain.checkpoint.safefile import write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.checkpoint.tensors import DTYPES, read_tensor
from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.convert.architectures import Architecture, fitting_architecture
from llmtrain.convert.folder import CARRIED, CONFIG, INDEX, SINGLE, write_index
from llmtrain.convert.fp8 import Fp8Weights, fp8_weights
from llmtrain.convert.masks import MASKS, export_masks, live_masks
from llmtrain.convert.names import VOCABULARY, Rule, rules_for
from llmtrain.convert.scaling import fold_factor, folded
from llmtrain.convert.writing import (
    SHARD_BYTES,
    Converted,
    Target,
    in_blocks,
    shards_of,
    write_file,
)
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import CheckpointError, DataError
from llmtrain.linear import Change, Frozen, Mask, adapted_weight
from llmtrain.model import ADAPTER, complete, packed_weights, whole_change

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of ours and what it is in transformers. run: the config it was saved with; cfg:
    its resolved model; source: where it was converted from; origin: all that is known of that."""

    path: Path
    run: RunConfig
    cfg: ModelConfig
    architecture: Architecture
    rules: list[Rule]
    files: dict[str, bytes]
    origin: dict[str, Any]
    notes: list[str]

    @property
    def source(self) -> str | None:
        """The folder the model was converted from, where it was."""
        return self.origin.get("source")


def open_checkpoint(src: Path, architecture: str | None = None) -> OpenedCheckpoint:
    """Open a checkpoint, or a run's newest good one. Raises CheckpointError."""
    found, skipped = find(Ranks(None), Path(src).expanduser(), MODEL_PREFIX)
    notes = [f"{fault}; {found.name} is converted instead" for fault in skipped]
    files = read_files(found)
    if "config.yaml" not in files or "data.json" not in files:
        raise CheckpointError(f"{found} has no config.yaml: it was not saved by llmtrain")
    run = load_config(found / "config.yaml")
    cfg = complete(run.model, json.loads(files["data.json"])["vocab_size"], run.data.seq_len)
    origin: dict[str, Any] = json.loads(files[META]).get("converted_from") or {}
    plain = folded(cfg)
    kind = _chosen(plain, architecture, origin)
    rules = rules_for(kind.name, plain)
    return OpenedCheckpoint(found, run, cfg, kind, rules, files, origin, notes)


def to_huggingface(
    src: Path,
    dst: Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
) -> Converted:
    """Write the model of a checkpoint (or of a run's newest good one) as ``transformers`` does.

    Adapters are merged into the weights, in float64 and rounded once. The masks of a sparse model
    are written beside them (``convert.masks``).

    architecture: by name; None: what it was converted from, or the one that computes the same.
    dtype: None: the one it was converted from, or that of the checkpoint. fp8: layers that compute
    in FP8 keep the FP8 weights of training (``convert.fp8``). Raises
    CheckpointError when no architecture fits, naming the settings that stand in the way; then
    nothing is written. Multipliers of ``model.scaling`` are folded into the weights.
    """
    opened = open_checkpoint(src, architecture)
    found, cfg, kind = opened.path, opened.cfg, opened.architecture
    plain = folded(cfg)
    layout = {
        key.removeprefix(MODEL_PREFIX): value
        for key, value in read_layout(found).items()
        if key.startswith(MODEL_PREFIX)
    }
    origin = opened.origin
    step = int(json.loads(opened.files[META])["step"])
    casts = fp8_weights(opened.run, cfg, step, kind.name) if fp8 else None
    writer = _Writer(found, layout, opened.rules, cfg, casts, live_masks(found, opened.run, cfg))
    target = dtype or _stored_dtype(layout, origin)
    with new_folder(Path(dst)) as temporary:
        size = writer.write(temporary, target, shard_bytes)
        export_masks(found, opened.rules, cfg, temporary / MASKS)
        config = kind.write(plain) | _ids(found, origin) | {"torch_dtype": _NAMES.get(target)}
        if casts is not None:
            config["quantization_config"] = casts.config(opened.rules)
        text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        carried = {name: data for name, data in opened.files.items() if name in CARRIED}
        for name, data in {CONFIG: text, **carried}.items():
            write_small(temporary / name, data)
    n_params = sum(torch.Size(entry.shape).numel() for entry in layout.values())
    return Converted(Path(dst), kind.name, n_params, size, opened.notes)


def _chosen(cfg: ModelConfig, wanted: str | None, origin: dict[str, Any]) -> Architecture:
    """The wanted architecture, else that of the origin where it still fits, else one that fits."""
    before = origin.get("architecture")
    if wanted is None and before is not None:
        try:
            return fitting_architecture(cfg, str(before))
        except CheckpointError:
            return fitting_architecture(cfg, None)
    return fitting_architecture(cfg, wanted)


def _stored_dtype(layout: dict[str, TensorLayout], origin: dict[str, Any]) -> torch.dtype:
    stored = next(iter(layout.values())).dtype
    return DTYPES[str(origin.get("dtype", stored))]


def _ids(found: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Numbers of special tokens, as the model came with them or of the tokenizer."""
    if origin.get("ids"):
        return dict(origin["ids"])
    try:
        return {"eos_token_id": load_tokenizer(found).eos_id}
    except DataError:
        return {}


class _Writer:
    """Reads a checkpoint and writes files of transformers' tensors."""

    def __init__(
        self,
        found: Path,
        layout: dict[str, TensorLayout],
        rules: list[Rule],
        cfg: ModelConfig,
        fp8: Fp8Weights | None,
        live: Mapping[str, Mask],
    ) -> None:
        self._found, self._layout, self._cfg = found, layout, cfg
        self._rules, self._fp8, self._live = rules, fp8, live
        section = cfg.adapters
        form = Frozen("" if section is None or section.base is None else section.base)
        self._packed = dict.fromkeys(packed_weights(cfg), form)
        own = {name for name in layout if ADAPTER not in name}
        lacking = sorted({rule.ours for rule in rules} ^ own)
        if lacking:
            raise CheckpointError(
                f"{found}: its tensors and its config.yaml do not agree on {lacking[0]} "
                f"({len(lacking)} such); the checkpoint is of another model"
            )

    def write(self, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
        """All files of weights and their index; returns their size."""
        made = self._units(dtype)
        units = [unit for unit, _ in made]
        by_name = {unit[0].name: rule for unit, rule in made}
        shards = shards_of(units, shard_bytes)
        places: dict[str, str] = {}
        size = 0
        for i, members in enumerate(shards):
            name = SINGLE
            if len(shards) > 1:
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            targets = [target for unit in members for target in unit]
            values = self._values([by_name[unit[0].name] for unit in members])
            size += write_file(folder / name, targets, values).bytes
            places |= {target.name: name for target in targets}
        if len(shards) > 1:
            total = sum(target.bytes for unit in units for target in unit)
            write_small(folder / INDEX, write_index(places, total))
        return size

    def _units(self, dtype: torch.dtype) -> list[tuple[list[Target], Rule]]:
        """What is written of every tensor of ours."""
        found = []
        for rule in self._rules:
            whole = torch.empty(self._layout[rule.ours].shape, device="meta")
            parts = rule.split(self._trimmed(rule, whole), self._cfg)
            named = zip(rule.theirs, parts, strict=True)
            targets = [Target(n, dtype, tuple(p.shape)) for n, p in named]
            if self._fp8 is not None and rule.ours in self._fp8.names:
                targets = [t for weight in targets for t in self._fp8.targets(weight)]
            found.append((targets, rule))
        return found

    def _trimmed(self, rule: Rule, whole: Tensor) -> Tensor:
        return whole[: self._cfg.vocab_size] if rule.ours in VOCABULARY else whole

    def _change(self, layer: str) -> Change | None:
        """The adapter of a layer."""

        def read(name: str) -> Tensor:
            key = f"{layer}.{name}"
            return read_tensor(self._found, MODEL_PREFIX + key, self._layout[key])

        return whole_change(self._cfg, layer, read)

    def _values(self, rules: list[Rule]) -> Iterator[Iterator[Tensor]]:
        for rule in rules:
            key = MODEL_PREFIX + rule.ours
            whole = read_tensor(self._found, key, self._layout[rule.ours])
            layer, _, leaf = rule.ours.rpartition(".")
            if leaf == "weight" and layer in self._live:
                self._live[layer].zero_(whole)
            if self._fp8 is not None and rule.ours in self._fp8.names:
                numbers, scale = self._fp8.cast(rule.ours, whole)
                for part in rule.split(numbers, self._cfg):
                    yield from map(in_blocks, self._fp8.values(part, scale))
                continue
            if rule.ours in self._packed:
                # What the run computed with, and the adapters were trained beside.
                form = self._packed[rule.ours]
                whole = form.unpack(form.pack(whole), torch.float32)
            factor = fold_factor(self._cfg, rule.ours)
            if factor != 1.0:
                whole = whole.float().mul_(factor)
            if leaf == "weight" and f"{layer}{ADAPTER}a.weight" in self._layout:
                change = self._change(layer)
                assert change is not None
                whole = adapted_weight(whole, change)
            parts = rule.split(self._trimmed(rule, whole), self._cfg)
            del whole
            for part in parts:
                yield in_blocks(part)
