"""Model folders as merging reads them: our checkpoints and Hugging Face safetensors folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import checkpoints_folder, read_files, scan
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import CHECKSUMS, MODEL_PREFIX, TENSORS, TensorLayout, read_layout
from llmtrain.checkpoint.safefile import Entry, read_header, read_into
from llmtrain.checkpoint.tensors import DTYPES, read_tensor
from llmtrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# In names of adapters' tensors. The module that knows takes longer to load than a small merge.
ADAPTERS = ".adapter."
# Small files that belong to a model and go with the result.
_BESIDE = {".json", ".yaml", ".txt", ".model", ".jinja", ".tiktoken"}
# With tied embeddings some writers store the head as well; readers do not look at it.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Keys of a Hugging Face config.json that change what the weights mean.
_STRUCTURE = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


# Along which dimension of a tensor, and which old place comes to each new one.
Move = tuple[int, Tensor]


@dataclass
class Source:
    """An opened model: dtype and shape of every tensor, and its small files.

    path: the checkpoint itself where a run was named. ours: a checkpoint of llmtrain (names without
    their ``model.`` prefix). moves: tensors that are permuted when they are read (see ``align``).
    warnings: a sentence for each newer checkpoint of the run that is damaged and was passed over.
    """

    path: Path
    ours: bool
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    files: dict[str, bytes]
    moves: dict[str, Move] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _stored: dict[str, TensorLayout] = field(default_factory=dict)
    _entries: dict[str, tuple[Path, Entry]] = field(default_factory=dict)

    def tell(self, warn: Callable[[str], None]) -> None:
        """Hand each warning on."""
        for text in self.warnings:
            warn(text)

    def whole(self, name: str) -> Tensor:
        """All of a tensor as it is stored."""
        reader = self._stored_reader(name)
        try:
            values = reader.block(0, math.prod(self.shapes[name])).view(self.shapes[name])
            require_finite(values, name, reader.path)
            return values
        finally:
            reader.close()

    def reader(self, name: str) -> Reader:
        """Reads one tensor; one that is permuted is held whole."""
        if name in self.moves:
            return Reader(self.path, None, self.whole(name).index_select(*self.moves[name]))
        return self._stored_reader(name)

    def _stored_reader(self, name: str) -> Reader:
        if name in self._entries:
            file, entry = self._entries[name]
            return Reader(file, entry)
        whole = read_tensor(self.path, MODEL_PREFIX + name, self._stored[name])
        return Reader(self.path, None, whole)


class Reader:
    """The values of a tensor in row-major order, block by block; threads may share it.

    path: the file they are read from, or the checkpoint when they lie in several.
    """

    def __init__(self, file: Path, entry: Entry | None, whole: Tensor | None = None) -> None:
        self.path, self._entry = file, entry
        self._whole = None if whole is None else whole.reshape(-1)
        self._file = None if entry is None else file.open("rb", buffering=0)

    def block(self, begin: int, end: int) -> Tensor:
        """A copy of elements [begin, end) as a flat tensor."""
        if self._whole is not None:
            return self._whole[begin:end].clone()
        assert self._entry is not None and self._file is not None
        values = torch.empty(end - begin, dtype=DTYPES[self._entry.dtype])
        view = values.view(torch.uint8).numpy().data
        place = self._entry.begin + begin * values.itemsize
        read_into(self._file.fileno(), view, place, self.path)
        return values

    def close(self) -> None:
        """Release the file; harmless when already closed."""
        if self._file is not None:
            self._file.close()


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; whole numbers never are."""
    if not values.is_floating_point():
        return True
    # A sum shows them in one pass; that it is not finite may also mean that it overflowed.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def require_finite(values: Tensor, name: str, path: Path) -> None:
    """Raise CheckpointError naming the tensor and its file when values are NaN or infinite."""
    if not is_finite(values):
        raise CheckpointError(
            f"{name} in {path} holds values that are NaN or infinite; leave that model out, or "
            "give a checkpoint from before they came up"
        )


def open_source(path: str) -> Source:
    """Open a checkpoint, a run (its newest good checkpoint) or a folder of safetensors files.

    Of checkpoints the model is verified. Raises CheckpointError naming what is missing or damaged.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointError(f"{place} does not exist; give a checkpoint, a run or a model folder")
    if place.is_file() or (_weights(place) and not (place / TENSORS).exists()):
        return _open_folder(place)
    if not ((place / TENSORS).exists() or scan(checkpoints_folder(place))):
        raise CheckpointError(
            f"{place} holds neither a checkpoint nor *.safetensors; give a model's folder"
        )
    found, faults = find(Ranks(None), place, MODEL_PREFIX)
    layouts = {
        key.removeprefix(MODEL_PREFIX): value
        for key, value in read_layout(found).items()
        if key.startswith(MODEL_PREFIX)
    }
    return Source(
        found,
        True,
        {k: v.shape for k, v in layouts.items()},
        {k: DTYPES[v.dtype] for k, v in layouts.items()},
        read_files(found),
        warnings=[f"{fault}; {found} is used instead" for fault in faults],
        _stored=layouts,
        _entries=dict(_whole_entries(found, layouts)),
    )


def _whole_entries(
    path: Path, layouts: dict[str, TensorLayout]
) -> Iterable[tuple[str, tuple[Path, Entry]]]:
    """Where tensors lie that are stored in one piece."""
    headers: dict[str, dict[str, Entry]] = {}
    for name, layout in layouts.items():
        if len(layout.chunks) == 1:
            file = layout.chunks[0].file
            if file not in headers:
                headers[file] = read_header(path / file)
            yield name, (path / file, headers[file][MODEL_PREFIX + name])


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _open_folder(place: Path) -> Source:
    """A folder of safetensors files, by its index where it has one; or a single file."""
    folder = place if place.is_dir() else place.parent
    files = [place] if place.is_file() else _weights(place)
    if place.is_dir() and (place / INDEX).exists():
        names = set(_json(place / INDEX).get("weight_map", {}).values())
        files = sorted(place / str(name) for name in names)
    entries = {name: (file, e) for file in files for name, e in _header(file).items()}
    beside: dict[str, bytes] = {}
    for file in sorted(folder.iterdir()) if place.is_dir() else ():
        if file.suffix in _BESIDE and file.name not in (INDEX, CHECKSUMS) and file.is_file():
            beside[file.name] = file.read_bytes()
    if _config_json(place, beside).get("tie_word_embeddings") and _EMBEDDING in entries:
        entries.pop(_HEAD, None)
    return Source(
        place,
        False,
        {name: e.shape for name, (_, e) in entries.items()},
        {name: DTYPES[e.dtype] for name, (_, e) in entries.items()},
        beside,
        _entries=entries,
    )


def _header(file: Path) -> dict[str, Entry]:
    try:
        return read_header(file)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; copy or download that file again") from error


def require_ours(source: Source, lacking: str) -> None:
    """Raise CheckpointError unless the model is a checkpoint of llmtrain.

    lacking: what is needed that other folders do not name.
    """
    if not source.ours:
        raise CheckpointError(
            f"{source.path} is not a checkpoint of llmtrain, so its {lacking} nobody knows; "
            "convert it with llmtrain convert from-hf"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON; mend or remove it") from error
    return value if isinstance(value, dict) else {}


def _config_json(path: Path, files: dict[str, bytes]) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    try:
        value = json.loads(files.get("config.json", b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is not JSON; mend it") from error
    return value if isinstance(value, dict) else {}


def check_alike(sources: list[Source]) -> None:
    """Raise CheckpointError naming the first thing in which models differ that must not.

    Names and shapes of tensors, the tokenizer, and the settings that give weights their meaning.
    """
    first = sources[0]
    for other in sources[1:]:
        pair = f"{first.path} and {other.path}"
        if first.ours != other.ours:
            raise CheckpointError(
                f"{pair} are of different kinds (llmtrain checkpoint, Hugging Face folder); "
                "convert one of them first"
            )
        missing = sorted(first.shapes.keys() ^ other.shapes.keys())
        if missing:
            where = first.path if missing[0] in first.shapes else other.path
            remedy = "models of one architecture can be merged"
            if any(ADAPTERS in name for name in missing):
                remedy = "merge adapters into the weights first, with convert to-hf and from-hf"
            raise CheckpointError(
                f"{pair} hold different tensors: only {where} has {missing[0]} "
                f"({len(missing)} differ); {remedy}"
            )
        for name, shape in first.shapes.items():
            if other.shapes[name] != shape:
                raise CheckpointError(
                    f"{pair} differ in shape: {name} is {list(shape)} and "
                    f"{list(other.shapes[name])}; models of one size can be merged"
                )
        _check_tokenizer(first, other)
        _check_structure(first, other)


def _check_tokenizer(first: Source, other: Source) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
        one, two = first.files.get(name), other.files.get(name)
        if one is None or two is None or one == two:
            continue
        if name.endswith(".json") and _same_json(one, two):
            continue
        raise CheckpointError(
            f"{first.path} and {other.path} have different tokenizers ({name}): the same token "
            "number means different text in them, so their weights cannot be merged"
        )


def _same_json(one: bytes, two: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


def _check_structure(first: Source, other: Source) -> None:
    facts = [_facts(first), _facts(other)]
    for key in facts[0].keys() & facts[1].keys():
        if facts[0][key] != facts[1][key]:
            raise CheckpointError(
                f"{first.path} and {other.path} differ in {key} ({facts[0][key]!r} and "
                f"{facts[1][key]!r}), so equal places in them do not mean the same"
            )


def _facts(source: Source) -> dict[str, Any]:
    """Settings by name that must agree."""
    if source.ours and "config.yaml" in source.files:
        import yaml

        model = (yaml.safe_load(source.files["config.yaml"]) or {}).get("model") or {}
        training_only = ("init_std", "init_depth_scale", "max_seq_len", "vocab_size")
        return {f"model.{k}": v for k, v in model.items() if k not in training_only}
    config = _config_json(source.path, source.files)
    return {f"config.json {k}": config[k] for k in _STRUCTURE if k in config}
