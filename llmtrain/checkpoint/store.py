"""The folder of a run's checkpoints: temporary folders, atomic publishing, pruning, the lock.

Every change is one rename, so that a kill at any moment leaves either the state before or the
state after, plus rubbish under a dotted name which the next run clears away. Torch is not needed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmtrain.checkpoint.layout import (
    ABANDONED,
    DELETED,
    LOCK,
    REPLACED,
    TEMPORARY,
    UPLOADING,
    Checkpoint,
    describe,
    parse_step,
    scan,
    step_name,
)
from llmtrain.checkpoint.verify import verify
from llmtrain.errors import CheckpointError

# A checkpoint's size changes a little from one to the next.
_ROOM = 1.05


class Store:
    """The checkpoints of one run. One process (rank 0) changes them; anyone may look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None

    def open(self, patience: float = 10.0) -> None:
        """Create the folder, lock it against other runs and clear away what killed runs left.

        patience: seconds to wait for a predecessor that is still ending. Raises CheckpointError
        when the folder cannot be written or another process keeps writing there.
        """
        with explain(f"{self.root} cannot be used for checkpoints"):
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked = self._take(descriptor, time.monotonic() + patience)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor
        if locked:
            with explain(f"{self.root} cannot be cleaned up"):
                self._clear()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, step: int) -> Path:
        """A new temporary folder for a step."""
        path = self.root / f"{TEMPORARY}{step_name(step)}-{secrets.token_hex(4)}"
        with explain(f"checkpoint of step {step} cannot be written to {self.root}"):
            path.mkdir()
        return path

    def make_room(self) -> list[Checkpoint]:
        """Delete all temporary checkpoints but the newest good one where another of its size does
        not fit on the disk; returns what was deleted. Raises CheckpointError."""
        found = scan(self.root)
        largest = max((c.bytes for c in found), default=0)
        with explain(f"{self.root} cannot be looked at"):
            free = shutil.disk_usage(self.root).free
        return self.prune(1) if free < _ROOM * largest else []

    def publish(self, temporary: Path, step: int) -> Path:
        """Give a finished temporary folder its name, replacing an older save of the same step.

        Its files must have been flushed. Raises OSError.
        """
        final = self.root / step_name(step)
        sync(temporary)
        replaced: Path | None = None
        if final.exists():
            replaced = self.root / f"{REPLACED}{final.name}-{secrets.token_hex(4)}"
            final.rename(replaced)
        temporary.rename(final)
        sync(self.root)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return final

    def discard(self, temporary: Path) -> None:
        """Remove a temporary folder that will not be published."""
        shutil.rmtree(temporary, ignore_errors=True)

    def superfluous(self, keep: int, trusted: int | None = None) -> list[Checkpoint]:
        """All but the ``keep`` newest temporary checkpoints; permanent ones are never among them.

        trusted: a step known to be good because it has just been written. Without it, those that
        would stay are read back, and if none of them is good the newest good one stays besides.
        """
        every = scan(self.root)
        temporary = [c for c in every if not c.permanent]
        doomed = temporary[: max(0, len(temporary) - max(1, keep))]
        if not doomed or trusted is not None:
            return doomed
        if not any(_is_good(c) for c in reversed(every) if c not in doomed):
            spared = next((c for c in reversed(doomed) if _is_good(c)), None)
            return [c for c in doomed if c is not spared]
        return doomed

    def prune(self, keep: int, trusted: int | None = None) -> list[Checkpoint]:
        """Delete what is ``superfluous`` and return it; raises CheckpointError."""
        doomed = self.superfluous(keep, trusted)
        for checkpoint in doomed:
            self.delete(checkpoint.path)
        return doomed

    def delete(self, path: Path) -> None:
        """Delete a published checkpoint; a kill in between never leaves half of one."""
        with explain(f"{path} cannot be deleted"):
            grave = self.root / f"{DELETED}{path.name}-{secrets.token_hex(4)}"
            path.rename(grave)
            shutil.rmtree(grave)

    def set_aside(self, after: int) -> list[Path]:
        """Rename the checkpoints of later steps than ``after`` to ``abandoned-...``.

        For a run that goes on from an earlier step: what lies ahead of it belongs to another
        course, and ``latest`` must not pick it up. Returns the new paths.
        """
        moved = []
        for checkpoint in scan(self.root):
            if checkpoint.step > after:
                nonce = secrets.token_hex(2)
                target = self.root / f"{ABANDONED}{checkpoint.path.name}-{nonce}"
                with explain(f"{checkpoint.path} cannot be set aside"):
                    checkpoint.path.rename(target)
                moved.append(target)
        return moved

    def abandoned(self) -> list[Checkpoint]:
        """What ``set_aside`` has put away."""
        folders = sorted(self.root.glob(f"{ABANDONED}step-*")) if self.root.is_dir() else []
        return [describe(path) for path in folders if path.is_dir()]

    def _take(self, descriptor: int, deadline: float) -> bool:
        """Lock the open lock file; False where the file system has no locks."""
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return False
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
                    raise CheckpointError(
                        f"another run is writing to {self.root} ({holder or 'unknown process'}); "
                        "wait until it has ended, or give this run another name"
                    ) from error
                time.sleep(0.1)
        with explain(f"{self.root} cannot be used for checkpoints"):
            os.ftruncate(descriptor, 0)
            owner = {"host": socket.gethostname(), "pid": os.getpid()}
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        return True

    def _clear(self) -> None:
        """Remove the rubbish of killed runs. Safe under the lock: nobody else writes here."""
        for path in list(self.root.iterdir()):
            if path.name.startswith(REPLACED):
                name = path.name.removeprefix(REPLACED).rpartition("-")[0]
                if parse_step(name) is not None and not (self.root / name).exists():
                    # Killed between the two renames of a replacement: the old one is the good one.
                    path.rename(self.root / name)
                    continue
            if path.name.startswith((TEMPORARY, DELETED, REPLACED, UPLOADING)):
                shutil.rmtree(path)


def _is_good(checkpoint: Checkpoint) -> bool:
    return checkpoint.problem is None and not verify(checkpoint.path)


def latest(root: Path) -> Path | None:
    """The newest checkpoint that passes the cheap checks; None when there is none."""
    good = (c.path for c in reversed(scan(root)) if c.problem is None)
    return next(good, None)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk: a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class explain:
    """Context that turns an OSError into a CheckpointError: ``what``: why and remedy; ``after``.

    move: how the user says where to write, as the remedy begins.
    """

    def __init__(self, what: str, after: str | None = None, move: str = "set `out` to") -> None:
        self.what, self.after, self.move = what, after, move

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            after = f"; {self.after}" if self.after else ""
            raise CheckpointError(f"{self.what}: {_reason(error, self.move)}{after}") from error


def _reason(error: OSError, move: str) -> str:
    """What a failed system call means, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full (or the quota used up); free space or {move} another disk"
    if error.errno == errno.EFBIG:
        return "the file would be larger than this process may write; raise `ulimit -f`"
    if error.errno == errno.EROFS:
        return f"the file system is read-only; {move} a folder that can be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied; {move} a folder that can be written"
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG):
        name = str(error.filename)
        # A temporary folder's name means nothing to the user, who has named the final one.
        where = "" if os.path.basename(name).startswith(TEMPORARY) else f" ({name})"
        return f"{error.strerror}{where}; {move} a folder that can be created"
    return f"{error.strerror or error}; {move} a healthy disk"


def temporary_beside(out: Path) -> Path:
    """A name for a temporary folder beside ``out``; nothing is made.

    What killed processes left there for the same ``out`` is removed. The name holds machine and
    process, so that only folders are whose process ran on this machine and is gone.
    """
    begin = f"{TEMPORARY}{out.name}-{_machine()}-"
    pattern = re.compile(re.escape(begin) + r"(\d{1,9})-[0-9a-f]{8}")
    with suppress(OSError):
        for path in list(out.parent.iterdir()):
            found = pattern.fullmatch(path.name)
            if found is not None and not _runs(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)
    return out.parent / f"{begin}{os.getpid()}-{secrets.token_hex(4)}"


def _machine() -> str:
    """A short name for the place whose process numbers these are: host and container."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.blake2b(f"{socket.gethostname()} {numbers}".encode(), digest_size=3).hexdigest()


def _runs(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` by one rename at the end, or vanishes.

    What a killed process left of an earlier try is removed first.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another folder")
    temporary = temporary_beside(out)
    with explain(f"{out} cannot be written", move="choose"):
        temporary.mkdir(parents=True)
    try:
        with explain(f"{out} cannot be written", move="choose"):
            yield temporary
            sync(temporary)
            temporary.rename(out)
            sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
