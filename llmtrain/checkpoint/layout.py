"""What a checkpoint looks like on disk, and which ones of a run are complete.

::

    RUN/checkpoints/
      .lock                            held by the run that writes here
      .tmp-step-00000200-<nonce>/      being written; nothing reads it
      step-00000100/                   published by one atomic rename, so whole by construction
        model-00000-of-00002.safetensors   the pieces of model.* that rank 0 wrote
        optim-00000-of-00002.safetensors   and, where hooks keep tensors, hook-...
        tensors.json                   which piece of which tensor lies in which file
        meta.json                      step, tokens, samples, versions, world size, permanent
        config.yaml data.json tokenizer.json extra.json    whatever the run handed over
        base.json                      only where frozen weights were left out, see ``Base``
      base-<hash>/                     weights that base.json speaks of, from an object store
        checksums.json                 size and xxh3_64 of every other file

Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.safefile import ALGORITHM, FileSum, hash_bytes
from llmtrain.errors import CheckpointError

META = "meta.json"
TENSORS = "tensors.json"
CHECKSUMS = "checksums.json"
BASE = "base.json"
# A base that came home from an object store lies beside the steps under this and its hash.
BASE_COPY = "base-"
LOCK = ".lock"
TEMPORARY, REPLACED, DELETED, ABANDONED = ".tmp-", ".old-", ".del-", "abandoned-"
# Links to the files of a checkpoint that is on its way to an object store.
UPLOADING = ".up-"
# Names of tensors begin with what they belong to.
MODEL_PREFIX, OPTIM_PREFIX, HOOK_PREFIX = "model.", "optim.", "hook."
VERSION = 1
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. problem: None, or why it cannot be used (cheap checks only)."""

    path: Path
    step: int
    meta: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    problem: str | None = None

    @property
    def permanent(self) -> bool:
        """True when pruning must leave it alone."""
        return bool(self.meta.get("permanent", False))


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a published folder's name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints_folder(path: Path) -> Path:
    """``RUN/checkpoints`` for a run's folder; the folder itself when it holds the steps."""
    inner = path / "checkpoints"
    return inner if inner.is_dir() else path


def scan(root: Path) -> list[Checkpoint]:
    """All published checkpoints under ``root``, oldest first, each with its cheap verdict."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        step = parse_step(path.name)
        if step is not None and path.is_dir():
            found.append(describe(path, step))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def describe(path: Path, step: int | None = None) -> Checkpoint:
    """One checkpoint folder: its meta data and whether all its files are there and whole-sized."""
    meta: dict[str, Any] = {}
    total, problem = 0, None
    try:
        meta = read_json(path / META)
        total = sum(entry.bytes for entry in read_checksums(path).values())
        problem = next(iter(size_problems(path)), None)
    except CheckpointError as error:
        problem = str(error)
    known = step if step is not None else parse_step(path.name)
    number = known if known is not None else int(meta.get("step", -1))
    return Checkpoint(path, number, meta, total, problem)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file otherwise."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value


def checksums_text(sums: Iterable[FileSum]) -> bytes:
    """The contents of checksums.json, which covers itself by ``digest``."""
    files = {s.name: {"bytes": s.bytes, ALGORITHM: s.digest} for s in sums}
    body = {"version": VERSION, "files": files, "digest": _digest(files)}
    return json.dumps(body, indent=1, sort_keys=True).encode()


def read_checksums(path: Path) -> dict[str, FileSum]:
    """checksums.json of a checkpoint folder by file name; CheckpointError when damaged."""
    body = read_json(path / CHECKSUMS)
    files = body.get("files")
    try:
        if body["version"] != VERSION or not isinstance(files, dict):
            raise ValueError
        if body["digest"] != _digest(files) or any(map(leads_out, files)):
            raise ValueError
        return {
            name: FileSum(name, int(entry["bytes"]), str(entry[ALGORITHM]))
            for name, entry in files.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path / CHECKSUMS} is damaged, or of another version than {VERSION}"
        ) from error


def leads_out(name: str) -> bool:
    """Whether a file name of a checkpoint is a path: to another folder, or no name at all."""
    return name in ("", "..") or "\0" in name or Path(name).name != name


def _digest(files: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(files, sort_keys=True).encode())


def size_problems(path: Path, files: Mapping[str, FileSum] | None = None) -> list[str]:
    """One sentence per file of a checkpoint that is missing or has another size than recorded.

    files: those that matter; None for all in its folder.
    """
    problems = []
    sums = read_checksums(path)
    for name in (META, TENSORS):
        if name not in sums:
            problems.append(f"{path / CHECKSUMS} does not list {name}")
    for name, entry in sorted((sums if files is None else files).items()):
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            problems.append(f"{path / name} is missing")
            continue
        except OSError as error:
            problems.append(f"{path / name} cannot be read: {error.strerror or error}")
            continue
        if size != entry.bytes:
            problems.append(f"{path / name} has {size} bytes where {entry.bytes} were written")
    return problems


def entry_name(key: str, offset: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> str:
    """Name of a piece inside a file: the tensor's own when whole, else with its ranges."""
    if tuple(shape) == tuple(whole):
        return key
    ranges = ",".join(f"{o}:{o + n}" for o, n in zip(offset, shape, strict=True))
    return f"{key}[{ranges}]"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, its shape, and the file that holds it.

    file: a name in the checkpoint's folder, or the whole path of a file of its base.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorLayout:
    """A stored tensor: safetensors' dtype name, global shape and the chunks that fill it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def layout_text(tensors: dict[str, TensorLayout]) -> bytes:
    """The contents of tensors.json."""
    files = sorted({chunk.file for layout in tensors.values() for chunk in layout.chunks})
    number = {name: i for i, name in enumerate(files)}
    body = {
        "version": VERSION,
        "files": files,
        "tensors": {
            key: {
                "dtype": layout.dtype,
                "shape": layout.shape,
                "chunks": [
                    {"file": number[c.file], "offset": c.offset, "shape": c.shape}
                    for c in layout.chunks
                ],
            }
            for key, layout in tensors.items()
        },
    }
    return json.dumps(body, separators=(",", ":")).encode()


def read_own_layout(path: Path) -> dict[str, TensorLayout]:
    """tensors.json of a checkpoint folder; CheckpointError when missing, damaged or newer.

    What lies in its base (``read_layout``) is not in it.
    """
    body = read_json(path / TENSORS)
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{path / TENSORS} has version {body.get('version')!r}; this llmtrain reads {VERSION}"
        )
    try:
        files = body["files"]
        if any(map(leads_out, files)):
            raise TypeError
        return {
            key: TensorLayout(
                value["dtype"],
                _numbers(value["shape"]),
                tuple(
                    Chunk(_numbers(c["offset"]), _numbers(c["shape"]), files[c["file"]])
                    for c in value["chunks"]
                ),
            )
            for key, value in body["tensors"].items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / TENSORS} is damaged") from error


def _numbers(found: Any) -> tuple[int, ...]:
    """A list of whole numbers; TypeError for anything else."""
    if not isinstance(found, list) or not all(type(n) is int for n in found):
        raise TypeError(found)
    return tuple(found)


@dataclass(frozen=True)
class Base:
    """A checkpoint that holds the frozen weights of others, which left them out.

    path: absolute. content: a hash of the checksums of its files of weights.
    """

    path: Path
    content: str

    def text(self, beside: Path) -> str:
        """base.json of a checkpoint in the folder ``beside``.

        The way from there is kept too, so that a folder with both may be moved.
        """
        own = Path(beside).resolve()
        body = {"path": str(self.path), "relative": os.path.relpath(self.path, own)}
        return json.dumps({**body, "content": self.content}, indent=1)


def content_of(path: Path) -> str:
    """A hash of the checksums of a checkpoint's own weights; CheckpointError when damaged."""
    facts = [[s.name, s.bytes, s.digest] for s in _weight_files(path)]
    return hash_bytes(json.dumps(facts).encode())


def _weight_files(path: Path) -> list[FileSum]:
    """The files with tensors of the model in a checkpoint's own folder."""
    sums = read_checksums(path)
    names = {
        chunk.file
        for key, layout in read_own_layout(path).items()
        if key.startswith(MODEL_PREFIX)
        for chunk in layout.chunks
    }
    return [sums[name] for name in sorted(names & sums.keys())]


def shard_name(group: str, rank: int, ranks: int) -> str:
    """The file in which ``rank`` of ``ranks`` writes what it holds of a group of tensors."""
    return f"{group}-{rank:05d}-of-{ranks:05d}.safetensors"


def writer_of(name: str) -> int:
    """The rank that wrote a file of a checkpoint; 0 for those of the whole (not ``shard_name``)."""
    found = re.fullmatch(r".*-(\d{5,})-of-\d{5,}\.safetensors", name)
    return int(found[1]) if found else 0


def base_wanted(path: Path) -> tuple[Path, str] | None:
    """Where the base of a checkpoint was and its hash; None for one without. CheckpointError."""
    wanted = _wanted(path)
    return None if wanted is None else wanted[:2]


def _wanted(path: Path) -> tuple[Path, str, str] | None:
    """The same, and where the base was from the checkpoint's parent folder on."""
    if not (path / BASE).exists():
        return None
    body = read_json(path / BASE)
    try:
        return Path(body["path"]), str(body["content"]), str(body.get("relative", ""))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / BASE} is damaged") from error


def base_of(path: Path) -> Base | None:
    """The base of a checkpoint, None for one that holds all its tensors itself.

    Raises CheckpointError naming both when the base is not there or no longer the same.
    """
    wanted = _wanted(path)
    if wanted is None:
        return None
    (there, content, relative), beside = wanted, path.resolve().parent
    near = os.path.normpath(beside / relative)
    came = [] if leads_out(content) else [beside / f"{BASE_COPY}{content}"]
    places = [p for p in (there, Path(near), *came) if (p / TENSORS).is_file()]
    if not places:
        raise CheckpointError(
            f"{path} holds adapters alone and their base, {there}, is not there (hash of its "
            f"weights: {content}); move that back, or make a link at that place to where it is now"
        )
    # Where several exist, what moved along may be the right one.
    place = next((p for p in places if _holds(p, content)), None)
    if place is None:
        content_of(places[0])  # damage has words of its own
        raise CheckpointError(
            f"{path} holds adapters alone and their base, {places[0]}, now holds other weights "
            "than when they were trained; put the checkpoint back that was there"
        )
    return Base(place.resolve(), content)


def _holds(path: Path, content: str) -> bool:
    try:
        return content_of(path) == content
    except CheckpointError:
        return False


def read_layout(path: Path) -> dict[str, TensorLayout]:
    """Every tensor of a checkpoint and where it lies, its own folder or the base's.

    Raises CheckpointError when tensors.json is missing or damaged, or the base is.
    """
    own, base = read_own_layout(path), base_of(path)
    return own if base is None else {**_lent(base.path), **own}


def _lent(base: Path) -> dict[str, TensorLayout]:
    """A base's weights, with the whole paths of their files."""
    return {
        key: replace(
            layout, chunks=tuple(replace(c, file=str(base / c.file)) for c in layout.chunks)
        )
        for key, layout in read_own_layout(base).items()
        if key.startswith(MODEL_PREFIX)
    }


def known_files(path: Path) -> dict[str, FileSum]:
    """Checksums of a checkpoint's files by name, and of its base's weights by whole path."""
    sums, base = read_checksums(path), base_of(path)
    if base is not None:
        sums |= {str(base.path / s.name): s for s in _weight_files(base.path)}
    return sums
