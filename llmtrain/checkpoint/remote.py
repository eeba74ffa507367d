"""Copies of a run's checkpoints in an object store, through fsspec.

A checkpoint is published to the run's folder as ever; then the main rank copies its files to
``ADDRESS/NAME/step-N/`` in the background and writes ``COMPLETE`` last. Only folders with that file
count, in the order of their steps; no clock is asked. What is deleted loses it first. A run that
finds a newer one there than in its own folder brings it home before it resumes.
"""

from __future__ import annotations

import json
import os
import queue
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.checkpoint.layout import (
    CHECKSUMS,
    UPLOADING,
    leads_out,
    parse_step,
    read_checksums,
    scan,
    step_name,
)
from llmtrain.checkpoint.safefile import hash_file
from llmtrain.checkpoint.store import Store, explain
from llmtrain.checkpoint.verify import verify
from llmtrain.errors import CheckpointError, EnvironmentFault

COMPLETE = "COMPLETE"
TRIES, FIRST_WAIT = 5, 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class Copied:
    """What became of a copy. problem: None, or why it was given up; the local one is whole."""

    step: int
    seconds: float
    problem: str | None = None


class Mirror:
    """The copies of one run. One process (rank 0) uses it.

    address: any fsspec address; credentials come from the environment alone. name: of the run.
    keep: newest temporary ones kept; permanent ones stay. wait: called with the seconds before
    another try. Raises EnvironmentFault where the package for such addresses is missing.
    """

    def __init__(
        self, address: str, name: str, keep: int, wait: Callable[[float], None] = time.sleep
    ) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if "@" in address:
            raise EnvironmentFault(
                "checkpoint.remote: the address holds a user or a password, which would end up in "
                "logs and configs; give credentials by the environment"
            )
        if not address.strip():
            raise EnvironmentFault("checkpoint.remote: is empty; give an address, or null")
        try:
            self._fs, root = url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise EnvironmentFault(
                f"checkpoint.remote: {address.partition('://')[0]} addresses cannot be used "
                f"({error}); install the fsspec package for them, such as s3fs or gcsfs"
            ) from error
        if isinstance(self._fs, LocalFileSystem):  # a folder that other machines have too
            self._fs.auto_mkdir = True
        self.address, self._keep, self._wait = address, keep, wait
        self._root = f"{root.rstrip('/')}/{name}"
        self._work: queue.Queue[tuple[Path, int] | None] = queue.Queue()
        self._done: list[Copied] = []
        self._thread: threading.Thread | None = None

    def push(self, path: Path, step: int) -> None:
        """Copy a published checkpoint in the background."""
        # Links, so that pruning meanwhile takes nothing away.
        source = path.parent / f"{UPLOADING}{path.name}-{secrets.token_hex(4)}"
        with explain(f"{path} cannot be linked for its copy"):
            shutil.copytree(path, source, copy_function=_link)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()
        self._work.put((source, step))

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

    def steps(self) -> list[int]:
        """Steps of complete copies, oldest first. Raises CheckpointError."""
        return sorted(self._markers())

    def bring_home(self, store: Store) -> int | None:
        """Publish the newest copy that is good in ``store``, if it is newer than what is there.

        Passed over are copies of another beginning of the run than what is there, one that was
        given up by ``resume: never``. Returns its step, None when there is nothing newer. Raises
        CheckpointError when the copies cannot be read.
        """
        good = [c for c in scan(store.root) if c.problem is None]
        local = good[-1].step if good else -1
        for step, marker in sorted(self._markers().items(), reverse=True):
            if step <= local:
                return None
            if good and marker["life"] != _life(good[-1].path):
                continue
            temporary = store.begin(step)
            try:
                if self._download(step, temporary) and not verify(temporary):
                    with explain(f"{store.root} cannot take the copy of step {step}"):
                        store.publish(temporary, step)
                    return step
            finally:
                store.discard(temporary)
        return None

    def _download(self, step: int, target: Path) -> bool:
        """Bring the files of a copy; returns whether all are there."""
        names = self._markers()[step]["files"]
        for name in [*names, CHECKSUMS]:
            if leads_out(name):
                raise CheckpointError(
                    f"{self.address}: {step_name(step)} names {name!r}; not a file"
                )
            where = f"{self._root}/{step_name(step)}/{name}"
            try:
                self._again(
                    f"{name} of step {step} cannot be read",
                    partial(self._fs.get_file, where, str(target / name)),
                )
            except CheckpointError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return False
                raise
        return True

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            source, step = item
            began = time.monotonic()
            try:
                self._upload(source, step)
                self._prune()
                self._done.append(Copied(step, time.monotonic() - began))
            except Exception as error:  # a copy is never worth the run
                self._done.append(Copied(step, time.monotonic() - began, str(error)))
            finally:
                shutil.rmtree(source, ignore_errors=True)

    def _upload(self, source: Path, step: int) -> None:
        folder = f"{self._root}/{step_name(step)}"
        what = f"the checkpoint of step {step} was not copied"
        self._again(what, lambda: self._forget(folder))
        sums = read_checksums(source)
        for name in [*sorted(sums), CHECKSUMS]:
            self._again(what, partial(self._fs.put_file, str(source / name), f"{folder}/{name}"))
        meta = json.loads((source / "meta.json").read_bytes())
        marker = {
            "files": sorted(sums),
            "checksums": hash_file(source / CHECKSUMS),
            "permanent": bool(meta.get("permanent", False)),
            "life": meta.get("life"),
        }
        self._again(
            what, lambda: self._fs.pipe_file(f"{folder}/{COMPLETE}", json.dumps(marker).encode())
        )

    def _prune(self) -> None:
        """Delete old copies, and what was left of copies that never became complete."""
        markers = self._markers()
        if not markers:
            return
        temporary = sorted(step for step, marker in markers.items() if not marker["permanent"])
        doomed = set(temporary[: max(0, len(temporary) - max(1, self._keep))])
        for step in self._folders():
            if step in doomed or (step not in markers and step < max(markers)):
                folder = f"{self._root}/{step_name(step)}"
                what = f"the copy of step {step} cannot be deleted"
                self._again(what, partial(self._forget, folder))

    def _forget(self, folder: str) -> None:
        """Remove a copy, its marker first."""
        if not self._fs.exists(folder):
            return
        if self._fs.exists(f"{folder}/{COMPLETE}"):
            self._fs.rm_file(f"{folder}/{COMPLETE}")
        self._fs.rm(folder, recursive=True)

    def _folders(self) -> list[int]:
        def look() -> list[int]:
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            names = [
                str(path).rstrip("/").rpartition("/")[2]
                for path in self._fs.ls(self._root, detail=False)
            ]
            return sorted(step for name in names if (step := parse_step(name)) is not None)

        return self._again("the copies cannot be listed", look)

    def _markers(self) -> dict[int, dict[str, Any]]:
        """Step -> marker of complete copies."""
        found: dict[int, dict[str, Any]] = {}
        for step in self._folders():
            where = f"{self._root}/{step_name(step)}/{COMPLETE}"

            def look(where: str = where) -> bytes | None:
                try:
                    return bytes(self._fs.cat_file(where))
                except FileNotFoundError:
                    return None

            text = self._again(f"the marker of step {step} cannot be read", look)
            marker = None if text is None else _marker(text)
            if marker is not None:
                found[step] = marker
        return found

    def _again(self, what: str, action: Callable[[], T]) -> T:
        """``action``, tried again with growing pauses; CheckpointError when it keeps failing."""
        pause = FIRST_WAIT
        for attempt in range(1, TRIES + 1):
            try:
                return action()
            except Exception as error:  # every store has its own exceptions
                if attempt == TRIES:
                    raise CheckpointError(
                        f"{what}: {self.address} failed {TRIES} times, the last time with "
                        f"{type(error).__name__}: {error}"
                    ) from error
            self._wait(pause * random.uniform(0.5, 1.0))
            pause *= 2
        raise AssertionError


def _life(path: Path) -> str | None:
    """Which beginning of the run a checkpoint is of."""
    found: str | None = json.loads((path / "meta.json").read_bytes()).get("life")
    return found


def _marker(text: bytes) -> dict[str, Any] | None:
    """What ``COMPLETE`` says; None where it is not as we write it, as if it were not there."""
    try:
        marker = json.loads(text)
        files, permanent = marker["files"], marker["permanent"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = isinstance(files, list) and all(isinstance(name, str) for name in files)
    life = marker.get("life")
    return {"files": files, "permanent": bool(permanent), "life": life} if whole else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
