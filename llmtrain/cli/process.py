"""Process settings that must be in place before torch loads, and the run that a command means.

OpenMP's waiting policy, the allocator's thresholds and the thread count are read once, when the
libraries load. So the command sets them and executes itself again, once. A variable that the
user has set keeps the user's value.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from llmtrain.errors import EnvironmentFault
from llmtrain.machine import usable_cores

if TYPE_CHECKING:
    from llmtrain.config import RunConfig

MARK = "LLMTRAIN_PROCESS_READY"
THREADS = "LLMTRAIN_THREADS"

# Passive waiting: threads that wait for work sleep instead of spinning, worth 4-5x on a machine
# that is shared. Allocator: keep big buffers instead of returning them to the system each step,
# which costs a page fault per 4 KiB to get back.
SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "true",
}


def wanted_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to ``environ``: settings the user has not made, and the thread count.

    Under torchrun, whose own default is one thread, the cores are shared between the node's
    processes; LLMTRAIN_THREADS overrides.
    """
    new = {key: value for key, value in SETTINGS.items() if key not in environ}
    under_torchrun = "TORCHELASTIC_RUN_ID" in environ
    if THREADS in environ:
        new["OMP_NUM_THREADS"] = environ[THREADS]
    elif under_torchrun or "OMP_NUM_THREADS" not in environ:
        here = int(environ.get("LOCAL_WORLD_SIZE", "1"))
        new["OMP_NUM_THREADS"] = str(max(1, usable_cores() // here))
    return new


OLDEST_TORCH = (2, 11)


def torch_fault() -> str | None:
    """What is wrong where the installed torch is missing or too old, and the remedy; else None.
    torch itself stays unimported, which takes a second and fails in odd places in an old one."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    remedy = f"install a newer one: pip install 'torch>={oldest}' (see llmtrain doctor)"
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return f"torch is not installed; {remedy}"
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is not None and (int(match[1]), int(match[2])) < OLDEST_TORCH:
        return f"torch {found} is too old for llmtrain; {remedy}"
    return None


def check_torch() -> None:
    """Raise EnvironmentFault where ``torch_fault`` finds one."""
    if fault := torch_fault():
        raise EnvironmentFault(fault)


_is_command = False


def this_is_the_command() -> None:
    """Allow ``prepare_process`` to execute the process again; only the entry point says so."""
    global _is_command
    _is_command = True


def prepare_process() -> None:
    """Set the process up and execute it again; returns at once the second time.

    Does nothing where llmtrain is used as a library: the process is not ours to replace.
    """
    check_torch()
    if not _is_command or os.environ.get(MARK) == str(os.getpid()):
        return
    environment = {**os.environ, **wanted_environment(os.environ), MARK: str(os.getpid())}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def load_run(
    args: argparse.Namespace, more: Sequence[str] = (), *, train: bool = False
) -> RunConfig:
    """The run that ``args.config``, ``args.overrides`` and ``more`` describe.

    train: require what only training needs. A length in epochs becomes tokens by the run's data,
    so commands that go on to compute set the process up first. Raises LlmtrainError.
    """
    from llmtrain.config import load_config
    from llmtrain.data.epochs import epochs_in_tokens

    overrides = [*args.overrides, *more]
    return load_config(args.config, overrides, for_training=train, epochs=epochs_in_tokens)
