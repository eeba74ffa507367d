"""Copies of a run's checkpoints in an object store, through fsspec.

A checkpoint is published to the run's folder as ever; then every rank copies the files it wrote to
``ADDRESS/NAME/step-N/`` in the background, and when all have, the main rank writes ``COMPLETE``.
Only folders with that file count, in the order of their steps; no clock is asked. What is deleted
loses it first. Where a checkpoint leaves frozen weights to a base, the base's go along once, to
``base-HASH/``. A run that finds a newer copy there than in its own folder brings it home before it
resumes, every rank a part of the files.
"""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import examine
from llmtrain.checkpoint.layout import (
    BASE,
    BASE_COPY,
    CHECKSUMS,
    META,
    MODEL_PREFIX,
    TEMPORARY,
    UPLOADING,
    base_of,
    base_wanted,
    content_of,
    leads_out,
    parse_step,
    read_checksums,
    read_own_layout,
    scan,
    step_name,
    writer_of,
)
from llmtrain.checkpoint.objects import Objects
from llmtrain.checkpoint.safefile import hash_file
from llmtrain.checkpoint.store import Store, explain, sync
from llmtrain.checkpoint.verify import checksum_problems
from llmtrain.errors import CheckpointError

# A rank may have to wait this long for the slowest copy of another.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Copied:
    """What became of a copy. problem: None, or why it was given up; the local one is whole."""

    step: int
    seconds: float
    problem: str | None = None


@dataclass(frozen=True)
class _Job:
    """A copy to be made. files: of this rank, in ``links``. base: the base's folder and hash."""

    step: int
    source: Path
    links: Path
    files: list[str]
    base: tuple[Path, str] | None
    problem: str | None = None


class Mirror:
    """The copies of one run; all ranks call every method but ``poll`` together.

    address: any fsspec address; credentials come from the environment alone. name: of the run.
    keep: newest temporary ones kept; permanent ones stay. ranks: of the run. wait: called with the
    seconds before another try. Raises EnvironmentFault where the package for such addresses is
    missing (CheckpointError with the same sentence where there are several ranks).
    """

    def __init__(
        self,
        address: str,
        name: str,
        keep: int,
        ranks: Ranks | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ranks = ranks or Ranks(None)
        found: list[Objects] = []
        self._ranks.reduce(lambda: found.append(Objects(address, name, wait)), lambda _: None)
        self.objects, self.address, self._keep = found[0], address, keep
        self._background = self._ranks.aside(_PATIENCE)
        self._work: queue.Queue[_Job | None] = queue.Queue()
        self._done: list[Copied] = []
        self._thread: threading.Thread | None = None

    def push(self, path: Path, step: int) -> None:
        """Copy a published checkpoint in the background."""
        job = self._job(path, step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()
        self._work.put(job)

    def poll(self) -> list[Copied]:
        """Copies that have come to an end since the last call."""
        found, self._done = self._done, []
        return found

    def finish(self) -> list[Copied]:
        """Wait until all is copied."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None
        return self.poll()

    def bring_home(self, store: Store) -> int | None:
        """Publish the newest copy that is good in ``store``, if it is newer than what is there.

        store: used by the main rank, and its folder shared by all. Passed over are copies of
        another beginning of the run than what is there, one that was given up by ``resume: never``.
        Returns its step, None when there is nothing newer. Raises CheckpointError when the copies
        cannot be read, or when the base of the newest one is nowhere.
        """
        for step, files in self._ranks.on_main(lambda: self._newer(store.root)):
            temporary = self._ranks.on_main(partial(store.begin, step))
            try:
                if self._fetch(step_name(step), files, temporary):
                    self._fetch_base(step, temporary)
                    if not examine(self._ranks, temporary):
                        self._ranks.on_main(partial(_publish, store, temporary, step))
                        return step
            finally:
                if self._ranks.is_main:
                    store.discard(temporary)
        return None

    def _newer(self, root: Path) -> list[tuple[int, list[str]]]:
        """Steps and files of the copies that may be brought home, the newest first."""
        good = [c for c in scan(root) if c.problem is None]
        local, life = (good[-1].step, _life(good[-1].path)) if good else (-1, None)
        return [
            (step, [*marker["files"], CHECKSUMS])
            for step, marker in sorted(self.objects.markers().items(), reverse=True)
            if step > local and (not good or marker["life"] == life)
        ]

    def _fetch(self, folder: str, files: Sequence[str], target: Path) -> bool:
        """Bring the files of a folder, each by one rank; returns whether all were there."""

        def own() -> bool:
            there = True
            for name in sorted(files)[self._ranks.rank :: self._ranks.size]:
                if leads_out(name):
                    raise CheckpointError(f"{self.address}: {folder} names {name!r}; not a file")
                what = f"{name} of {folder} cannot be read"
                there = there and self.objects.get(f"{folder}/{name}", target / name, what)
                if there:
                    with explain(f"{target / name} cannot be written"):
                        sync(target / name)
            return there

        return self._ranks.reduce(own, all)

    def _fetch_base(self, step: int, path: Path) -> None:
        """Bring the base of a checkpoint as well, where it has one that is not at hand.

        Raises CheckpointError naming the base when there is no copy of it either.
        """

        def look() -> tuple[str, list[str]] | None:
            wanted = base_wanted(path)
            if wanted is None:
                return None
            try:
                base_of(path)
            except CheckpointError:
                marker = self.objects.marker(_base_name(wanted[1]))
                if marker is not None:
                    return wanted[1], marker["files"]
                raise CheckpointError(
                    f"{self.address}: the copy of step {step} holds adapters alone, and the frozen "
                    f"weights they belong to (hash {wanted[1]}) are neither there nor at "
                    f"{wanted[0]}, where they were; put them back there"
                ) from None
            return None

        found = self._ranks.on_main(look)
        if found is None:
            return
        content, files = found
        home = path.parent / _base_name(content)
        folder = path.parent / f"{TEMPORARY}{home.name}-{secrets.token_hex(4)}"
        folder = self._ranks.on_main(lambda: _made(folder))

        def publish(whole: bool) -> None:
            weights = [name for name in files if name.endswith(".safetensors")]
            right = whole and content_of(folder) == content
            if not right or checksum_problems(folder, weights):
                raise CheckpointError(
                    f"{self.address}: {home.name}, the frozen weights of step {step}, is damaged"
                )
            with explain(f"{path.parent} cannot take the base of step {step}"):
                sync(folder)
                shutil.rmtree(home, ignore_errors=True)
                folder.rename(home)

        try:
            whole = self._fetch(home.name, files, folder)
            self._ranks.on_main(partial(publish, whole))
        finally:  # of a killed process the store removes it when it is opened next
            if self._ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _job(self, path: Path, step: int) -> _Job:
        """Links to this rank's files, so that pruning meanwhile takes nothing away.

        What fails here is told with the copy: on one rank alone it must not be raised.
        """
        links = path.parent / f"{UPLOADING}{path.name}-{self._ranks.rank}-{secrets.token_hex(4)}"
        try:
            files = [
                name
                for name in [*sorted(read_checksums(path)), CHECKSUMS]
                if writer_of(name) % self._ranks.size == self._ranks.rank
            ]
            base = base_of(path)
            with explain(f"{path} cannot be linked for its copy"):
                links.mkdir()
                for name in files:
                    _link(path / name, links / name)
        except CheckpointError as error:
            return _Job(step, path, links, [], None, str(error))
        return _Job(step, path, links, files, None if base is None else (base.path, base.content))

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            began = time.monotonic()
            problem = None
            try:
                self._upload(job)
            except Exception as error:  # a copy is never worth the run
                problem = str(error)
            shutil.rmtree(job.links, ignore_errors=True)
            self._done.append(Copied(job.step, time.monotonic() - began, problem))

    def _upload(self, job: _Job) -> None:
        what = f"the checkpoint of step {job.step} was not copied"
        lacking = self._background.on_main(lambda: self._make_place(job, what))
        self._background.reduce(
            lambda: self._put(job, lacking, what), lambda _: self._complete(job, lacking, what)
        )

    def _make_place(self, job: _Job, what: str) -> list[str]:
        """Clear away what stands there of the step; the files of the base that are lacking."""
        self.objects.forget(step_name(job.step), what)
        if job.base is None or self.objects.marker(_base_name(job.base[1])) is not None:
            return []
        self.objects.forget(_base_name(job.base[1]), what)
        return _model_files(job.base[0])

    def _put(self, job: _Job, lacking: list[str], what: str) -> None:
        if job.problem is not None:
            raise CheckpointError(f"{what}: {job.problem}")
        for name in job.files:
            self.objects.put(job.links / name, f"{step_name(job.step)}/{name}", what)
        for name in lacking[self._ranks.rank :: self._ranks.size]:
            assert job.base is not None
            self.objects.put(job.base[0] / name, f"{_base_name(job.base[1])}/{name}", what)

    def _complete(self, job: _Job, lacking: list[str], what: str) -> None:
        """Write the markers once all ranks have copied theirs, then delete old copies."""
        content = job.base and job.base[1]
        if lacking:
            assert content is not None
            marker = {"files": lacking, "permanent": True, "life": None, "base": None}
            self.objects.complete(_base_name(content), marker, what)
        meta = json.loads((job.links / META).read_bytes())
        marker = {
            "files": sorted(read_checksums(job.links)),
            "checksums": hash_file(job.links / CHECKSUMS),
            "permanent": bool(meta.get("permanent", False)),
            "life": meta.get("life"),
            "base": content,
        }
        self.objects.complete(step_name(job.step), marker, what)
        self._prune()

    def _prune(self) -> None:
        """Delete old copies, and what was left of copies that never became complete."""
        markers = self.objects.markers()
        temporary = sorted(step for step, marker in markers.items() if not marker["permanent"])
        doomed = set(temporary[: max(0, len(temporary) - max(1, self._keep))])
        bases = {_base_name(m["base"]) for s, m in markers.items() if s not in doomed and m["base"]}
        for name in self.objects.folders():
            step = parse_step(name)
            if step is None:
                over = name.startswith(BASE_COPY) and name not in bases
            else:
                over = step in doomed or (step not in markers and step < max(markers))
            if over:
                self.objects.forget(name, f"the copy {name} cannot be deleted")


def _model_files(path: Path) -> list[str]:
    """Files of a checkpoint without those that hold only what is not the model's."""
    files: dict[bool, set[str]] = {True: set(), False: set()}
    for key, layout in read_own_layout(path).items():
        files[key.startswith(MODEL_PREFIX)].update(chunk.file for chunk in layout.chunks)
    names = read_checksums(path).keys() - (files[False] - files[True]) - {BASE}
    return [*sorted(names), CHECKSUMS]


def _base_name(content: str) -> str:
    """The folder of a base's copy. Raises CheckpointError for what is no hash."""
    if re.fullmatch("[0-9a-f]+", content) is None:
        raise CheckpointError(f"{content!r} is not the hash of a base")
    return f"{BASE_COPY}{content}"


def _publish(store: Store, temporary: Path, step: int) -> None:
    with explain(f"{store.root} cannot take the copy of step {step}"):
        store.publish(temporary, step)


def _made(folder: Path) -> Path:
    with explain(f"{folder.parent} cannot take the base of a copy"):
        folder.mkdir()
    return folder


def _life(path: Path) -> str | None:
    """Which beginning of the run a checkpoint is of."""
    found: str | None = json.loads((path / META).read_bytes()).get("life")
    return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
